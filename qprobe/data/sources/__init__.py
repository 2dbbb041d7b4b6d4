"""One file per kind of data source: what it takes, and its rows."""
