"""What can go wrong before a request is ever served.

ClusterError
├── ConfigError           a setting is wrong; one line per problem, each naming the field
├── PortInUseError        a configured port is taken
├── ClusterStartError     the cluster did not become ready
├── NoClusterError        a command needs a running cluster and there is none
├── TrainingError         the processes of a training cannot start, or too many died
└── RequestError          a running cluster refused a request, or broke it off
"""

from __future__ import annotations


class ClusterError(Exception):
    """Base of every error of this package; the command line prints it without a traceback.

    Attributes:
        exit_code: what the command line exits with.
    """

    exit_code = 1


class ConfigError(ClusterError):
    """Settings are wrong.

    Args:
        problems: one sentence each, beginning with where the setting stands.
    """

    exit_code = 2

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class PortInUseError(ClusterError):
    """A port that the configuration asks for is taken.

    Args:
        port: the port.
        setting: the setting that names it.
    """

    exit_code = 3

    def __init__(self, port: int, setting: str) -> None:
        super().__init__(port, setting)
        self.port = port
        self.setting = setting

    def __str__(self) -> str:
        return (
            f"port {self.port} is in use; end the program that holds it, or set {self.setting} "
            "to another port (0 picks a free one)"
        )


class ClusterStartError(ClusterError):
    """The cluster did not become ready."""

    exit_code = 4


class NoClusterError(ClusterError):
    """No running cluster was found."""

    exit_code = 5


class RequestError(ClusterError):
    """A running cluster refused a request, broke it off, or did not answer."""

    exit_code = 7


class TrainingError(ClusterError):
    """The processes of a training cannot start, or too many died."""

    exit_code = 8
