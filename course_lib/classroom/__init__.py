"""Classroom: how the course reaches people: running chapters, the command line."""
