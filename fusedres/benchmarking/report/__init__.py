"""``python -m fusedres report``: files of results as a page with tables and figures, or two of them compared."""
