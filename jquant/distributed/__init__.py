"""Devices and processes: the mesh, what processes of a run say to each other, one function over shards."""
