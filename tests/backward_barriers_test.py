"""The barriers of Hopper's backward (src/cuda/kernels/hopper/backward_*.cuh), in every order that its warpgroups can come.

A model: the producer, the two warpgroups that have keys and the one that makes dq, with their rings of mbarriers, which say
no more than the parity of their phase.  Breadth first over all states: nobody may wait for ever, nothing may be written
while somebody reads it.  Whoever changes a wait in the kernel changes it here first.
"""

import collections
import functools
import itertools

STEPS = 8  # that the walk keeps
State = collections.namedtuple("State", "barriers producer owners dq copies")
#: Of a ring: places, arrivals that fill a place, arrivals that empty it.
OWN_KEYS = {"q": (2, 1, 2), "dout": (2, 1, 2), "dS": (2, 2, 1)}
SHARED_KEYS = {"q": (2, 1, 2), "dout": (1, 1, 1), "P": (2, 1, 1), "looked": (2, 1, 1), "dS": (2, 1, 1)}


class Model:
    """`rings` with their barriers; `owners`: two lists of what a warpgroup does in a tile, and behind the last one."""

    def __init__(self, rings, owners, ends):
        self.rings, self.owners, self.ends = rings, owners, ends
        self.barriers = [(ring, side, place) for ring in rings for side in ("full", "empty") for place in range(rings[ring][0])]

    def arrive(self, barriers, ring, side, n):
        places, *arrivals = self.rings[ring]
        at = self.barriers.index((ring, side, n % places))
        phase, arrived = barriers[at]
        over = arrived + 1 == arrivals[side == "empty"]
        return barriers[:at] + (((phase + 1) % 4, 0) if over else (phase, arrived + 1),) + barriers[at + 1:]

    def passes(self, barriers, ring, side, n):
        places = self.rings[ring][0]
        parity = n // places & 1 ^ (side == "empty")
        return barriers[self.barriers.index((ring, side, n % places))][0] & 1 != parity

    def reads(self, state, ring, n):
        """Whether somebody may still read use n of a ring."""
        for group, (does, at) in enumerate(state.owners):
            script = self.owners[group]
            last = [i for i, step in enumerate(script) if step in (("free", ring), ("read", ring))]
            if at == n and last and 0 < does <= last[0]:
                return True
        return ring == "dS" and state.dq == (1, n)

    def produce(self, s, tiles):
        does, n = s.producer
        ring = ("q", "dout")[does] if does < 2 else None
        if ring and self.passes(s.barriers, ring, "empty", n):
            assert not self.reads(s, ring, n - self.rings[ring][0]), f"{ring} is overwritten"
            if n == tiles:
                yield s._replace(barriers=self.arrive(s.barriers, "q", "full", n), producer=(3, n))
            else:
                yield s._replace(producer=(does + 1, n), copies=s.copies | {(ring, "full", n)})
        if does == 2:
            users = [at for group, (what, at) in enumerate(s.owners) if 0 < what < len(self.owners[group])]
            users += [s.dq[1], s.dq[1] - 1] if s.dq[0] == 1 else []  # in turns it passes the last step's while it adds this one's
            assert all(at == n + 1 or (at - n - 1) % STEPS for at in users), "a step is overwritten"
            yield s._replace(producer=(0, n + 1))

    def own(self, s, tiles, group):
        does, n = s.owners[group]
        script = self.owners[group] + self.ends[group]
        if does == len(script):
            return

        def then(what, at=n, barriers=s.barriers):
            owners = list(s.owners)
            owners[group] = (what, at)
            return s._replace(barriers=barriers, owners=tuple(owners))

        act, *ring = script[does]
        if does == 0:  # the first of a tile is to wait for q
            if self.passes(s.barriers, "q", "full", n):
                yield then(len(self.owners[group]) if n == tiles else 1)
            return
        last = does + 1 == len(self.owners[group])
        following = (0, n + 1) if last else (does + 1, n)
        if act == "wait" and self.passes(s.barriers, ring[0], ring[1], n + (ring[2] if len(ring) > 2 else 0)):
            yield then(*following)
        if act == "fill":
            assert does >= len(self.owners[group]) or not self.reads(s, ring[0], n - self.rings[ring[0]][0]), "overwritten"
            yield then(*following, self.arrive(s.barriers, ring[0], "full", n))
        if act == "read":  # for the last time: somebody else gives it back
            yield then(*following)
        if act == "free":
            yield then(*following, self.arrive(s.barriers, ring[0], "empty", n))

    def make_dq(self, s, tiles):
        does, n = s.dq
        if does == 0 and self.passes(s.barriers, "dS", "full", n):
            yield s._replace(dq=(2 if n == tiles else 1, n))
        if does == 1:
            yield s._replace(barriers=self.arrive(s.barriers, "dS", "empty", n), dq=(0, n + 1))

    def explore(self, tiles):
        """How many states there are."""
        start = State(((0, 0),) * len(self.barriers), (0, 0), ((0, 0), (0, 0)), (0, 0), frozenset())
        seen, todo = {start}, collections.deque([start])
        ends = [len(self.owners[g]) + len(self.ends[g]) for g in (0, 1)]
        while todo:
            s = todo.popleft()
            following = [*self.produce(s, tiles), *self.own(s, tiles, 0), *self.own(s, tiles, 1), *self.make_dq(s, tiles)]
            following += [s._replace(barriers=self.arrive(s.barriers, *copy), copies=s.copies - {copy}) for copy in s.copies]
            ended = s.producer[0] == 3 and s.dq[0] == 2 and [does for does, _ in s.owners] == ends
            assert following or ended, f"with {tiles} tiles all wait: {s}"
            fresh = set(following) - seen
            seen |= fresh
            todo.extend(fresh)
        return len(seen)


def own_keys():
    tile = [("wait", "q", "full"), ("wait", "dout", "full"), ("wait", "dS", "empty"), ("fill", "dS"), ("free", "dout"), ("free", "q")]
    end = [("wait", "dS", "empty"), ("fill", "dS"), ("wait", "dS", "empty", 1)]
    return Model(OWN_KEYS, (tile, tile), (end, end))


def shared_keys(hides):
    """hides: both agree before they add, in every tile."""
    agree = [("wait", "looked", "full")] if hides else []
    weights = [("wait", "q", "full"), ("free", "q"), ("wait", "P", "empty"), ("fill", "P"), ("wait", "dout", "full"), *agree,
               ("wait", "looked", "full"), ("free", "looked"), ("free", "dout")]
    gradients = [("wait", "q", "full"), ("wait", "dout", "full"), ("wait", "P", "full"), ("free", "P"), ("read", "dout"),
                 ("wait", "looked", "empty"), ("fill", "looked"), *agree, ("wait", "dS", "empty"), ("fill", "dS"), ("free", "q")]
    end = [("wait", "dS", "empty"), ("fill", "dS"), ("wait", "dS", "empty", 1)]
    return Model(SHARED_KEYS, (weights, gradients), ([], end))


def take_turns(key_blocks, row_tiles, heads, abreast, resident, causal):
    """Deterministic: blocks begin in the order of their tickets, `resident` of them at once, add to dq of a tile from the last
    key block that sees it to the first, and pass a step's turn once they have added to the next step's.  What one may do it may
    do until it does it, so one order tells of all."""
    tickets, walks = collections.Counter(), []
    for ticket in range(heads * key_blocks):
        line = ticket // abreast
        head, block = line // key_blocks * abreast + ticket % abreast, key_blocks - 1 - line % key_blocks
        lasts = [tile * key_blocks // row_tiles if causal else key_blocks - 1 for tile in range(row_tiles)]
        walks.append([((head, tile), last - block) for tile, last in enumerate(lasts) if last >= block])
    running = [(walk, 0) for walk in walks[:resident]]
    waiting = walks[resident:]
    while running:
        before, running = running, []
        for walk, added in before:
            if added < len(walk) and tickets[walk[added][0]] == walk[added][1]:
                added += 1
                if added > 1:
                    tickets[walk[added - 2][0]] += 1
            elif added == len(walk):
                tickets[walk[-1][0]] += 1
                walk = None
            if walk:
                running.append((walk, added))
            elif waiting:
                running.append((waiting.pop(0), 0))
        assert running != before, f"all wait for turns: {running}"


if __name__ == "__main__":
    cases = list(itertools.product((1, 3, 5), (5, 8), (1, 2, 4), (1, 2, 3, 7), (False, True)))
    for key_blocks, row_tiles, abreast, resident, causal in cases:
        take_turns(key_blocks, row_tiles, 8, abreast, resident, causal)
    print(f"turns: {len(cases)} grids, nobody waits for ever")
    for name, model in (("keys of their own", own_keys()), ("shared keys", shared_keys(False)), ("shared keys, hidden entries", shared_keys(True))):
        counts = [model.explore(tiles) for tiles in range(7)]
        print(f"{name}: {functools.reduce(int.__add__, counts)} states of 0 to 6 tiles, nobody waits for ever")
