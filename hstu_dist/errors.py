"""The one error type that is shown to a user as a single line instead of a stack trace."""


class UserError(Exception):
    """Bad input, configuration or environment: says what was got and how to mend it.

    Args:
        problem: what was got and what was expected, in one sentence.
        remedy: what to do about it, in one sentence; may be empty.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = " ".join(problem.split())
        self.remedy = " ".join(remedy.split())
        super().__init__(f"{self.problem} -> {self.remedy}" if self.remedy else self.problem)

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str]]:
        # worker processes and threads hand errors on by pickling them
        return (type(self), (self.problem, self.remedy))
