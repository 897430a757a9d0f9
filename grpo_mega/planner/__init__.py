"""Memory and time of a run before it starts: no GPU, no weights. Sees policy and engine only through interfaces."""
