"""What a command of `lbw-rl` answered."""

import json
from typing import Any, NamedTuple


class Answer(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is no JSON")

        assert self.code == 0, self.err
        return json.loads(self.out, parse_constant=refuse)

    def refusal(self) -> str:
        """The one line on standard error of a command that was given something it cannot use."""
        assert (self.code, self.out) == (2, ""), self
        assert self.err.startswith("lbw-rl: ")
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1
        return self.err.removeprefix("lbw-rl: ").rstrip("\n")
