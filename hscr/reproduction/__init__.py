"""`hscr reproduce`: the paper's comparison on the demo benchmark, over seeds, with intervals. plan -> cell -> run -> table."""
