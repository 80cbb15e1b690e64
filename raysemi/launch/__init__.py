"""Starting a run: on Ray, under torchrun, or in one plain process."""
