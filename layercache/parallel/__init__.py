"""Samples shared out over processes: the group that shares them (`crew`), and what starts its processes."""
