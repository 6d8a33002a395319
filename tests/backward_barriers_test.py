"""The barriers of Hopper's backward (src/cuda/kernels/hopper/backward_*.cuh), in every order that its warpgroups can come.

A model: the producer, the two warpgroups that own keys and the one that makes dq, with their rings of mbarriers, which say
no more than the parity of their phase.  Breadth first over all states: nobody may wait for ever, nothing may be written
while somebody reads it.  Whoever changes a wait in the kernel changes it here first.
"""

import collections
import sys

STAGES, STEPS = 2, 8  # places of q, dout and dS; steps that the walk keeps
ARRIVALS = {"q full": 1, "q empty": 2, "dout full": 1, "dout empty": 2, "dS full": 2, "dS empty": 1}
BARRIERS = [(name, place) for name in ARRIVALS for place in range(STAGES)]


class Barriers:
    """(phase mod 4, arrivals) of each."""

    START = ((0, 0),) * len(BARRIERS)

    @staticmethod
    def arrive(state, name, n):
        at = BARRIERS.index((name, n % STAGES))
        phase, arrived = state[at]
        now = ((phase + 1) % 4, 0) if arrived + 1 == ARRIVALS[name] else (phase, arrived + 1)
        return state[:at] + (now,) + state[at + 1:]

    @staticmethod
    def passes(state, name, n):
        parity = n // STAGES & 1 ^ (1 if name.endswith("empty") else 0)
        return state[BARRIERS.index((name, n % STAGES))][0] & 1 != parity


def produce(state, tiles):
    """Next states by the producer: (what it does next, n)."""
    barriers, (does, n), owners, dq, copies = state
    if does == "q" and Barriers.passes(barriers, "q empty", n):
        assert all(at != n - STAGES or what == "wait" for what, at in owners), "q is overwritten"
        if n == tiles:
            yield Barriers.arrive(barriers, "q full", n), ("end", n), owners, dq, copies
        else:
            yield barriers, ("dout", n), owners, dq, copies | {("q full", n)}
    if does == "dout" and Barriers.passes(barriers, "dout empty", n):
        yield barriers, ("step", n), owners, dq, copies | {("dout full", n)}
    if does == "step":
        users = [at for what, at in owners if what not in ("wait", "end")] + ([dq[1]] if dq[0] == "make" else [])
        assert all(at == n + 1 or (at - n - 1) % STEPS for at in users), "a step is overwritten"
        yield barriers, ("q", n + 1), owners, dq, copies


def own(state, tiles, group):
    """By a warpgroup that owns keys."""
    barriers, producer, owners, dq, copies = state
    does, n = owners[group]

    def then(what, at, now=barriers):
        return now, producer, owners[:group] + ((what, at),) + owners[group + 1:], dq, copies

    if does == "wait" and Barriers.passes(barriers, "q full", n):
        yield then("last" if n == tiles else "dP", n)
    if does == "dP" and Barriers.passes(barriers, "dout full", n):
        yield then("dS", n)
    if does == "dS" and Barriers.passes(barriers, "dS empty", n):
        assert dq != ("make", n - STAGES), "dS is overwritten"
        yield then("free dout", n, Barriers.arrive(barriers, "dS full", n))
    if does == "free dout":
        yield then("free q", n, Barriers.arrive(barriers, "dout empty", n))
    if does == "free q":
        yield then("wait", n + 1, Barriers.arrive(barriers, "q empty", n))
    if does == "last" and Barriers.passes(barriers, "dS empty", n):
        yield then("store", n, Barriers.arrive(barriers, "dS full", n))
    if does == "store" and Barriers.passes(barriers, "dS empty", n + 1):
        assert dq[1] == n and dq[0] != "make", "K is overwritten"
        yield then("end", n)


def make_dq(state, tiles):
    barriers, producer, owners, (does, n), copies = state
    if does == "wait" and Barriers.passes(barriers, "dS full", n):
        yield barriers, producer, owners, ("end" if n == tiles else "make", n), copies
    if does == "make":
        yield Barriers.arrive(barriers, "dS empty", n), producer, owners, ("wait", n + 1), copies


def arrive_copies(state):
    barriers, producer, owners, dq, copies = state
    for copy in copies:
        yield Barriers.arrive(barriers, *copy), producer, owners, dq, copies - {copy}


def explore(tiles):
    """How many states there are."""
    start = Barriers.START, ("q", 0), (("wait", 0), ("wait", 0)), ("wait", 0), frozenset()
    seen, todo = {start}, collections.deque([start])
    while todo:
        state = todo.popleft()
        following = [*produce(state, tiles), *own(state, tiles, 0), *own(state, tiles, 1), *make_dq(state, tiles),
                     *arrive_copies(state)]
        ended = state[1][0] == state[3][0] == "end" and all(does == "end" for does, _ in state[2])
        assert following or ended, f"with {tiles} tiles all wait: producer {state[1]}, owners {state[2]}, dq {state[3]}"
        fresh = set(following) - seen
        seen |= fresh
        todo.extend(fresh)
    return len(seen)


if __name__ == "__main__":
    for tiles in range(7):
        print(f"{tiles} tiles: {explore(tiles)} states, nobody waits for ever")
    sys.exit(0)
