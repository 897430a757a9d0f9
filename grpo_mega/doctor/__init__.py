"""Checks that are made before a job starts, each with its remedy. They start nothing and write nothing."""
