"""The named write points of an attempt, in the order in which it passes them (tests/chaos/watched.py marks them).

The stages of the run lie between "run started" and "run ended"; "no attempt" is what a fault finds where no supervisor works.
"""

POINTS = ("claimed", "folder made", "run started", "generating", "optimizing", "checkpoint", "evaluating", "reporting")
POINTS += ("run ended", "publishing", "artifact stored", "report stored", "row written", "committed")
