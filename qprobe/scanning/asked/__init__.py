"""The door of a scan: what was asked becomes typed values, and the line that is recorded of it."""
