"""Answers that are errors."""


class AnswerError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(status)
        self.status = status
        self.message = message
        self.body: dict[str, object] = {"error": message}
        named = {"X-Error-Code": code, "X-Error-Message": message}
        self.headers = {name: value for name, value in named.items() if value} | headers
