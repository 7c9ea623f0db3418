"""Where a governed run's decisions go besides the ledger: each sink is one backend, none is loaded unless asked for."""

from lbw_rl.sinks.sink import Decision, Sink

__all__ = ["Decision", "Sink"]
