"""What must hold before a run begins."""
