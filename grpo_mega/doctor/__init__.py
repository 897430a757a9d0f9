"""Every check that can be made before a job starts, each with its remedy. Starts and writes nothing."""
