"""From files to tokens, and from rollouts to rows."""
