"""Who evaluates the trials of a search: this process, a pool of processes, or a cluster."""
