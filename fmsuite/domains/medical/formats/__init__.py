"""File formats of volumes: each module reads one family of them, from a path to voxels along the file's own axes."""
