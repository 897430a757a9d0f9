"""Engines that are servers: the job's side and theirs."""
