"""Engines that run as servers on devices of their own: the side of the job, and the side of the server."""
