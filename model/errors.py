"""Ways for a run to end before its time that are no bad setting."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message is one line."""


class RankLost(TrainingStopped):
    """Another rank has died, or answers no more."""
