"""Jobs dealt out to processes of a cluster, by a stand-in for Ray whose processes die when they are told to."""

import platform
import socket
import sys
import threading
import time

import pytest

from moemerge import cluster
from moemerge.cluster import Cluster
from moemerge.errors import CheckpointError, ConfigError, MoemergeError, RefusedError, TooLargeError
from moemerge.joining import _results_apart, check_address, ray_cluster
from tests.support.stand_in_ray import Ray, RayError, RayTaskError, sent

DONE: list[object] = []
"""What was done by processes, each of which has copies of its arguments alone."""


class Worker:
    def __init__(self, ready):
        self.ready = ready

    def check(self):
        if not self.ready:
            raise ConfigError("no:", ["place"])

    def run(self, job):
        if job == "bad":
            raise RefusedError("a bad job")
        DONE.append(job)
        return f"did {job}"


def dealt(lives, count, jobs=range(20), cpus=8, ready=True):
    DONE.clear()
    ray = Ray(lives, cpus)
    return ray, Cluster(ray).dealt(Worker, (ready,), jobs, count)


@pytest.mark.parametrize("lives", [[99], [0, 2, 99], [-1, 99], [5, 5, 5, 0, 0, 99], [3, 3, 3, 3, 3, 3, 2, 2, 2]])
def test_every_job_is_done_once_whoever_dies(lives):
    ray, given = dealt(lives, 3)
    assert sorted(given) == [(job, f"did {job}") for job in range(20)]
    assert sorted(DONE) == list(range(20))
    assert ray.killed == ray.made


def test_where_all_died_the_last_words_are_given():
    ray, given = dealt([1], 2)
    with pytest.raises(MoemergeError) as raised:
        list(given)
    assert str(raised.value) == "all processes of the Ray cluster died: killed"
    assert (len(DONE), len(ray.made)) == (6, 6)
    assert ray.killed == ray.made


def test_what_a_process_raises_is_raised_and_all_are_ended():
    ray, given = dealt([99], 2, ["good", "bad", "good", "never"])
    with pytest.raises(RefusedError, match=r"^a bad job$"):
        list(given)
    assert ray.killed == ray.made
    _, given = dealt([99], 1, ready=False)
    with pytest.raises(ConfigError) as raised:
        list(given)
    assert raised.value.problems == ("place",)


class Faulty:
    def __init__(self, at):
        self.at = at
        self.fail("making")

    def check(self):
        self.fail("checking")

    def run(self, _job):
        self.fail("running")

    def fail(self, what):
        if what == self.at:
            raise ValueError(f"a fault\n  in {what}")


@pytest.mark.parametrize("at", ["making", "checking", "running"])
def test_a_fault_in_a_process_is_one_line_that_names_the_machine(at):
    ray = Ray()
    with pytest.raises(MoemergeError) as raised:
        list(Cluster(ray).dealt(Faulty, (at,), [1], 1))
    assert str(raised.value) == (
        f"--ray: a process on {platform.node()} failed (ValueError: a fault in {at}). If that machine lacks nothing, "
        "this is a fault in moemerge: please report it, with what --debug shows."
    )
    assert isinstance(raised.value.__cause__, RayTaskError)  # which has Ray's traceback
    assert (ray.killed, raised.value.exit_code) == (ray.made, 1)


class DoesNotBeginError(RayError):
    """As Ray raises it."""

    actor_init_failed = True


TRACEBACK = (
    "the actor died: ray::Worker.__init__() (pid=1, ip=10.0.0.2, repr=...)\n    ^^^^\nNo module named 'moemerge'"
)


def raising(error):
    def fail():
        raise error

    return fail


def test_what_ray_raises_is_the_last_line_of_its_traceback():
    with pytest.raises(MoemergeError) as raised:
        Cluster(Ray()).results([raising(RayTaskError(RuntimeError(TRACEBACK)))])
    assert str(raised.value) == "a process of the Ray cluster failed: RuntimeError: No module named 'moemerge'"
    with pytest.raises(MoemergeError, match="^a process of the Ray cluster died: out of memory$"):
        Cluster(Ray()).results([raising(RayError("out of\nmemory"))])


def test_where_no_process_can_begin_the_machine_is_named(monkeypatch):
    expected = (
        "--ray: no process can begin on 10.0.0.2 (No module named 'moemerge'). Install there what is installed here: the "
        "same moemerge, Python and other packages."
    )
    with pytest.raises(RefusedError) as refused:
        Cluster(Ray()).results([raising(DoesNotBeginError(TRACEBACK))])
    assert str(refused.value) == expected
    monkeypatch.setattr(Ray, "get", lambda *_: raising(DoesNotBeginError(TRACEBACK))())
    with pytest.raises(RefusedError) as refused:
        list(Cluster(Ray()).dealt(Worker, (True,), [1], 1))
    assert str(refused.value) == expected


@pytest.mark.parametrize(("free", "begun"), [(0, 0), (1, 1), (1, 3), (8, 0)])
def test_where_other_work_holds_the_cluster_it_is_said_what_is_waited_for(monkeypatch, free, begun):
    class Busy(Ray):
        def wait(self, references, num_returns=1, timeout=None):
            assert (num_returns, timeout) == (3, 0)
            return references[:begun], references[begun:]

    told, ray = [], Busy(free=free)
    monkeypatch.setattr(cluster, "_PATIENCE", 0.02)
    monkeypatch.setattr(cluster._log, "warning", lambda text, *given: told.append(text % given))
    expected = [
        f"--ray: {3 - begun} of 3 processes wait for 1 CPU each; the cluster has 8 CPUs ({free} free). They begin when "
        "other work ends (`ray status` shows it); --workers asks for fewer."
    ]
    monkeypatch.setattr(Cluster, "_deal", lambda *_: iter([time.sleep(0.2)]))
    list(Cluster(ray).dealt(Worker, (True,), range(3), 3))
    assert told == (expected if free < 3 and begun < 3 else [])


def test_a_cluster_without_room_is_refused_and_without_jobs_nothing_begins():
    _, given = dealt([99], 3, cpus=2)
    with pytest.raises(RefusedError) as refused:
        list(given)
    assert str(refused.value) == ("--workers 3: the cluster has 2 CPUs, and each process takes one. Ask for 2 at most.")
    ray, given = dealt([99], 1, [])
    assert (list(given), ray.made) == ([], [])


def test_what_a_process_raises_is_raised_before_others_are_done():
    class Endless(Ray):
        def wait(self, references):
            assert len(references) == 2, "one is waited for that never ends"
            return references[1:], references[:1]

    def fail():
        raise RayTaskError(RefusedError("no such file there"))

    told = []
    with pytest.raises(RefusedError, match=r"^no such file there$"):
        Cluster(Endless()).results([lambda: None, fail], lambda done, count: told.append((done, count)))
    assert told == [(0, 2)]


def test_what_ray_says_is_not_among_results(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)  # for the time of the test
    ray = Ray().install()
    monkeypatch.setattr(ray, "shutdown", lambda: print("(raylet) repeated"))
    with ray_cluster("local", 1):
        print("found")
        for said in (
            "a process died",
            "Error: The actor is dead because it was killed by `ray.kill`.",
            "\nTraceback (most recent call last):\n",
            "one more",
        ):
            listening = threading.Thread(target=print, args=(f"(raylet) {said}",), name="ray_listen_error_messages")
            listening.start()
            listening.join()
    assert capsys.readouterr() == ("found\n", "(raylet) a process died\n(raylet) one more\n(raylet) repeated\n")


@pytest.mark.parametrize(
    "error", [CheckpointError("a\x1b[31m b"), TooLargeError("x: holds 1e9", "Widen it"), ConfigError("no:", ["a", "b"])]
)
def test_an_error_is_the_same_in_another_process(error):
    same = sent(error)
    assert (type(same), str(same), vars(same)) == (type(error), str(error), vars(error))


def test_addresses_where_no_cluster_can_be_are_refused():
    with pytest.raises(RefusedError, match=r"^--ray locl: is neither local nor auto nor HOST:PORT\. "):
        check_address("locl")
    with socket.socket() as held:  # bound, but not listening
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(RefusedError, match=rf"^--ray {address}: nothing answers there .*`ray status`\.$"):
            check_address(address)
        held.listen()
        check_address(address)
    check_address("local")
    check_address("auto")


def test_what_ray_says_of_processes_that_were_ended_is_left_out(capsys):
    """Ray prints what its processes say from threads of its own, to either stream."""

    def say():
        print("killed by `ray.kill`", file=sys.stderr)
        print("killed by `ray.kill`")
        print("a machine was lost")

    with _results_apart():
        thread = threading.Thread(target=say, name="ray_print_logs")
        thread.start()
        thread.join()
        print("a result")
        print("a warning", file=sys.stderr)
    assert capsys.readouterr() == ("a result\n", "a machine was lost\na warning\n")
