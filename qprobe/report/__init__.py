"""What people read: figures and terminal tables from a run folder; no torch."""
