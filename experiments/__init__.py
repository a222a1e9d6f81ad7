"""Science done with the library: each module regenerates one page of docs/results."""
