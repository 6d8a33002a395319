"""The barriers of Hopper's backward (src/cuda/kernels/hopper/backward_*.cuh), in every order that its warpgroups can come.

A model: the producer, the two warpgroups that have keys and the one that makes dq, with their rings of mbarriers, which say
no more than the parity of their phase; of the other block of a pair, who makes its dS and its dq.  Breadth first over all
states: nobody may wait for ever, nothing may be written while somebody reads it.  Whoever changes a wait in the kernel
changes it here first.
"""

import collections
import functools
import itertools
import random

STEPS = 8  # that the walk keeps
TASKS = 4  # that a block knows
ENDED = 9  # what the producer does behind the last tile
#: actors: what each does next, and of which tile; copies: those under way, as the arrivals that end them.
State = collections.namedtuple("State", "barriers producer actors copies")
#: Of a ring: places, arrivals that fill a place, arrivals that empty it.
OWN_KEYS = {"q": (2, 1, 2), "dout": (2, 1, 2), "dS": (2, 2, 1)}
#: A block's dS is there when it and the other one's are, and is given back by both; "other dS" is the other block's.
SHARED_KEYS = {"q": (2, 1, 2), "dout": (1, 1, 1), "P": (2, 1, 1), "looked": (2, 1, 1), "dS": (2, 2, 2), "other dS": (2, 2, 2)}


class Model:
    """`rings` with their barriers; `actors`: of each, what it does in a tile, and what behind the last one.  The first thing is
    to wait; it then knows whether there is a tile."""

    def __init__(self, rings, actors):
        self.rings = rings
        self.tiles_of, self.ends = zip(*actors)
        names = [(ring, side, place) for ring in rings for side in ("full", "empty") for place in range(rings[ring][0])]
        self.index = {name: at for at, name in enumerate(names)}

    def arrive(self, barriers, ring, side, n):
        places, *arrivals = self.rings[ring]
        at = self.index[ring, side, n % places]
        phase, arrived = barriers[at]
        over = arrived + 1 == arrivals[side == "empty"]
        return barriers[:at] + (((phase + 1) % 4, 0) if over else (phase, arrived + 1),) + barriers[at + 1:]

    def passes(self, barriers, ring, side, n):
        places = self.rings[ring][0]
        parity = n // places & 1 ^ (side == "empty")
        return barriers[self.index[ring, side, n % places]][0] & 1 != parity

    def reads(self, state, ring, n):
        """Whether somebody may still read use n of a ring, or of another place of as many."""
        for script, (does, at) in zip(self.tiles_of, state.actors):
            last = [i for i, step in enumerate(script) if step in (("free", ring), ("read", ring))]
            if at == n and last and 0 < does <= last[0]:
                return True
        return ring == "dS" and ("other dS", "full", n) in state.copies  # from there

    def produce(self, s, tiles):
        does, n = s.producer
        loads = [ring for ring in ("q", "bias", "dout") if ring in self.rings]
        ring = loads[does] if does < len(loads) else None
        if ring and self.passes(s.barriers, ring, "empty", n):
            assert not self.reads(s, ring, n - self.rings[ring][0]), f"{ring} is overwritten"
            if n == tiles:
                yield s._replace(barriers=self.arrive(s.barriers, "q", "full", n), producer=(ENDED, n))
            else:
                yield s._replace(producer=(does + 1, n), copies=s.copies | {(ring, "full", n)})
        if does == len(loads):
            here = [(what, at, script) for script, (what, at) in zip(self.tiles_of, s.actors) if script[0][1] in ("q", "dS")]
            users = [at for what, at, script in here if 0 < what < len(script)]
            users += [at - 1 for _, at, script in here if script[0][1] == "dS"]  # in turns it passes the last step's later than it adds
            assert all(at == n + 1 or (at - n - 1) % STEPS for at in users), "a step is overwritten"
            yield s._replace(producer=(0, n + 1))

    def act(self, s, tiles, who):
        does, n = s.actors[who]
        script = self.tiles_of[who] + self.ends[who]
        if does == len(script):
            return

        def then(what, at=n, **changed):
            return s._replace(actors=s.actors[:who] + ((what, at),) + s.actors[who + 1:], **changed)

        act, ring, *more = script[does]
        while act in ("read", "write"):  # until the next thing is done: who reads for the last time, somebody else gives it back
            assert act == "read" or not self.reads(s, ring, n - (more[0] if more else 2)), f"{ring} is overwritten"
            does += 1
            act, ring, *more = script[does]
        tile = len(self.tiles_of[who])
        following = (tile, n) if does == 0 and n == tiles else (0, n + 1) if does + 1 == tile else (does + 1, n)
        if act == "wait" and self.passes(s.barriers, ring, more[0], n + (more[1] if len(more) > 1 else 0)):
            yield then(*following)
        if act == "fill":
            yield then(*following, barriers=self.arrive(s.barriers, ring, "full", n))
        if act == "send":  # by the copy engine
            yield then(*following, copies=s.copies | {(ring, "full", n)})
        if act == "add":  # of the tile that its step names
            yield then(*following)
        if act == "free":
            yield then(*following, barriers=self.arrive(s.barriers, ring, "empty", n))

    def explore(self, tiles):
        """How many states there are."""
        start = State(((0, 0),) * len(self.index), (0, 0), ((0, 0),) * len(self.tiles_of), frozenset())
        seen, todo = {start}, collections.deque([start])
        ends = [len(script) + len(end) for script, end in zip(self.tiles_of, self.ends)]
        while todo:
            s = todo.popleft()
            following = [*self.produce(s, tiles)]
            for who in range(len(s.actors)):
                following += self.act(s, tiles, who)
            following += [s._replace(barriers=self.arrive(s.barriers, *copy), copies=s.copies - {copy}) for copy in s.copies]
            ended = s.producer[0] == ENDED and [does for does, _ in s.actors] == ends
            assert following or ended, f"with {tiles} tiles all wait: {s}"
            fresh = set(following) - seen
            seen |= fresh
            todo.extend(fresh)
        return len(seen)


def with_bias(places, readers, tile):
    """The rings' and the tile's part of a bias, which is read before anything else is done with the scores."""
    if not places:
        return {}, tile
    return {"bias": (places, 1, readers)}, [tile[0], ("wait", "bias", "full"), ("free", "bias"), *tile[1:]]


def own_keys(bias, ahead):
    """ahead: a warpgroup looks at the next tile before it gives this one's rows back."""
    look = [("wait", "q", "full", 1)] if ahead else []
    tile = [("wait", "q", "full"), ("wait", "dout", "full"), ("wait", "dS", "empty"), ("write", "dS"), ("fill", "dS"), *look,
            ("free", "dout"), ("free", "q")]
    end = [("wait", "dS", "empty"), ("fill", "dS"), ("wait", "dS", "empty", 1)]
    ring, tile = with_bias(bias, 2, tile)
    return Model({**OWN_KEYS, **ring}, [(tile, end), (tile, end), ([("wait", "dS", "full"), ("free", "dS")], [])])


def shared_keys(hides, broken=False, bias=0):
    """hides: both agree before they add, in every tile; broken: and find what is not finite."""
    agree = [("wait", "looked", "full")] if hides else []
    again = [("wait", "dS", "empty", 2), ("write", "dS", 0)] if broken else []
    weights = [("wait", "q", "full"), ("free", "q"), ("wait", "dS", "empty"), ("write", "dS"), ("fill", "P"), ("wait", "dout", "full"),
               *agree, *again, ("wait", "looked", "full"), ("free", "looked"), ("free", "dout")]
    ring, weights = with_bias(bias, 1, weights)
    gradients = [("wait", "q", "full"), ("wait", "dout", "full"), ("wait", "P", "full"), ("read", "dout"), ("wait", "looked", "empty"),
                 ("fill", "looked"), *agree, ("read", "dS"), ("write", "sent"), ("send", "other dS"), ("fill", "dS"), ("free", "q")]
    end = [("wait", "dS", "empty"), ("fill", "dS"), ("fill", "dS"), ("wait", "dS", "empty", 1)]
    dq = [("wait", "dS", "full"), ("read", "received"), ("free", "dS"), ("free", "other dS"), ("add", "dq")]
    # Of the other block all may be as slow or as fast as it likes that is not held up by dS.
    other_again = [("wait", "other dS", "empty", 2)] if broken else []
    other = [("wait", "other dS", "empty"), ("write", "received"), ("send", "dS"), ("fill", "other dS"), *other_again]
    other_end = [("fill", "other dS"), ("fill", "other dS"), ("wait", "other dS", "empty", 1)]
    other_dq = [("wait", "other dS", "full"), ("read", "sent"), ("free", "other dS"), ("free", "dS")]
    return Model({**SHARED_KEYS, **ring}, [(weights, []), (gradients, end), (dq, []), (other, other_end), (other_dq, [])])


def held(tiles_of_keys):
    """A block has one tile of keys after the other, each with so many tiles of rows, then a step without any, which has a place in
    every ring.  How many states there are."""
    return going_on(tiles_of_keys, 1, 1, held=True)


def going_on(tasks, k_places, v_places, held=False):
    """A block has one task after the other: so many tiles of rows, or None, to turn sums into dq, for which it takes the memory of
    all rows; then a step without rows.  Its next task is known when a step without rows is announced.  held: tiles of keys of one
    task.  Each actor is a list of what it does; how many states there are."""
    rings = {"q": (2, 1, 2), "dout": (2, 1, 2), "dS": (2, 2, 1), "k": (k_places, 1, 3), "v": (v_places, 1, 2), "met": (1, 3, 3)}
    producer, owner, dq, n, met = [], [], [], 0, 0
    for k, tiles in enumerate(tasks):
        keys = [("arrive", "k", "full", k), ("arrive", "v", "full", k)] if tiles is None else None
        producer += [("write", "task", k)] if k == 0 else []
        producer += [("wait", "k", "empty", k), *([] if keys else [("copy", "k", "full", k)]), ("wait", "v", "empty", k),
                     *(keys or [("copy", "v", "full", k)])]
        if k > 0 and tasks[k - 1] is None:
            producer += [("wait", "q", "empty", n - 1 + 2)]
        owner += [("read", "task", k)]
        owner += [] if tiles is None else [("wait", "k", "full", k), ("wait", "v", "full", k)]
        for _ in range(tiles or 0):
            producer += [("wait", "q", "empty", n), ("copy", "q", "full", n), ("wait", "dout", "empty", n), ("copy", "dout", "full", n)]
            owner += [("wait", "q", "full", n), ("wait", "dout", "full", n), ("wait", "dS", "empty", n), ("arrive", "dS", "full", n),
                      ("wait", "q", "full", n + 1), ("arrive", "dout", "empty", n), ("arrive", "q", "empty", n)]
            dq += [("wait", "dS", "full", n), ("arrive", "dS", "empty", n)]
            n += 1
        next_task = [("write", "task", k + 1)] if k + 1 < len(tasks) else []
        producer += [*next_task, ("wait", "q", "empty", n), ("wait", "dout", "empty", n), ("arrive", "dout", "full", n),
                     ("arrive", "q", "full", n)]
        passed = [("arrive", "q", "empty", n), ("wait", "dout", "full", n), ("arrive", "dout", "empty", n)]
        ended = [("wait", "dS", "empty", n), ("arrive", "dS", "full", n)]
        owner += [("wait", "q", "full", n), ("arrive", "k", "empty", k)]
        if tiles is None:
            together = [("arrive", "met", "full", met), ("wait", "met", "full", met)]
            owner += [("arrive", "v", "empty", k), *ended, *together, ("read", "task", k), *passed]
            met += 1
        else:
            owner += [*passed, ("arrive", "v", "empty", k), *ended, ("read", "task", k)]
        dq += [("read", "task", k), ("wait", "dS", "full", n)]
        if not held or k + 1 < len(tasks):
            dq += [("arrive", "k", "empty", k), ("arrive", "dS", "empty", n)]
        dq += [("arrive", "met", "full", met - 1)] if tiles is None else [("read", "task", k)]
        n += 1
    return explore(rings, (producer, owner, owner, dq), f"tasks of {tasks} tiles", {"task": TASKS})


def turns(tiles, lag, places=1):
    """Deterministic: who makes dq has a warp beside the producer pass a step's turn `lag` steps later, which looks the step up; all
    turns are announced in one place.  How many states there are."""
    rings = {"q": (2, 1, 2), "dout": (2, 1, 2), "dS": (2, 2, 1), "turns": (places, 1, 1)}
    producer, owner, dq, passing = [], [], [], []
    for n in range(tiles + 1):
        exists = n < tiles
        producer += [("write", "step", n), ("wait", "q", "empty", n), ("arrive", "q", "full", n)]
        owner += [("wait", "q", "full", n)]
        dq += [("wait", "dS", "full", n)]
        if exists:
            producer += [("wait", "dout", "empty", n), ("arrive", "dout", "full", n)]
            owner += [("wait", "dout", "full", n), ("wait", "dS", "empty", n), ("arrive", "dS", "full", n), ("arrive", "dout", "empty", n),
                      ("arrive", "q", "empty", n)]
        else:
            owner += [("wait", "dS", "empty", n), ("arrive", "dS", "full", n)]
        for m in range(max(n - lag, 0), n - lag + 1 if exists else n + 1):
            dq += [("wait", "turns", "empty", m), ("arrive", "turns", "full", m)]
        dq += [("arrive", "dS", "empty", n)] if exists else []
        passing += [("wait", "turns", "full", n), ("read", "step", n), ("arrive", "turns", "empty", n)]
    return explore(rings, (producer, owner, owner, dq, passing), f"{tiles} tiles, lag {lag}", {"step": STEPS})


def explore(rings, scripts, what, places=None):
    """Each actor is a list of what it does; how many states there are.  places: of what is written and read as use n of it; a read
    is as late as it may be, a copy is there as soon as it is asked for."""
    model, places = Model(rings, [([], [])]), places or {}
    names = [(name, place) for name in places for place in range(places[name])]
    index = {name: at for at, name in enumerate(names)}
    start = (((0, 0),) * len(model.index), (0,) * len(scripts), frozenset(), (None,) * len(names))
    seen, todo = {start}, collections.deque([start])
    while todo:
        barriers, at, copies, lies = state = todo.popleft()
        following = [(model.arrive(barriers, *copy), at, copies - {copy}, lies) for copy in copies]
        for who, script in enumerate(scripts):
            does = at[who]
            while does < len(script) and script[does][0] == "read":
                does += 1
            if does == len(script):
                following += [(barriers, at[:who] + (does,) + at[who + 1:], copies, lies)] if does > at[who] else []
                continue
            act, *of = script[does]
            if act == "wait" and not model.passes(barriers, *of):
                continue
            for _, name, n in script[at[who]:does]:
                assert lies[index[name, n % places[name]]] == n, f"with {what} {name} is overwritten"
            then = at[:who] + (does + 1,) + at[who + 1:]
            if act == "arrive":
                following.append((model.arrive(barriers, *of), then, copies, lies))
            elif act == "wait":
                following.append((barriers, then, copies, lies))
            elif act == "copy":
                ring, side, n, *parts = of
                for name in parts:
                    lies = lies[:index[name, n % places[name]]] + (n,) + lies[index[name, n % places[name]] + 1:]
                following.append((barriers, then, copies | {(ring, side, n)}, lies))
            elif act == "write":
                name, n, *as_what = of
                place = index[name, n % places[name]]
                following.append((barriers, then, copies, lies[:place] + (as_what[0] if as_what else n,) + lies[place + 1:]))
        assert following or at == tuple(map(len, scripts)), f"with {what} all wait: {state}"
        fresh = set(following) - seen
        seen |= fresh
        todo.extend(fresh)
    return len(seen)


def bias_gradient(key_panels, panels, places, bias_places, at_once, sharers):
    """bias_gradient.cuh: tiles with so many sharers each; at_once: both products are asked for before the first is awaited.  Who
    copies panels, who brings biases and has sums stored, who looks at a bias, and two warpgroups, each with its half of a bias's
    place."""
    steps = 2
    while steps * panels < places + key_panels:
        steps *= 2
    rings = {"panel": (places, 1, 2), "bias": (bias_places, 1, 2), "known": (bias_places, 1, 1)}
    load, exchange, look, groups, step = [], [], [], ([], []), 0
    for t, count in enumerate([*sharers, 1]):
        for sharer in range(count):
            first = step * panels
            for n in range(first, first + (panels if t < len(sharers) else 1)):
                load += [("wait", "panel", "empty", n), *([("write", "step", step)] if n == first else []), ("copy", "panel", "full", n, "panel")]
            for g, group in enumerate(groups):
                leave = [("write", f"bias {g}", t - 1, ("sum", t - 1)), ("arrive", "bias", "empty", t - 1)] if t > 0 and sharer == 0 else []
                group += [("wait", "panel", "full", first), ("read", "step", step)]
                if t == len(sharers):
                    group += leave
                    continue
                known = [("wait", "known", "full", t), ("read", "known", t)] if sharer == 0 else []
                group += [*leave, *known]
                keys_end, end = first + key_panels, first + panels
                group += [("wait", "panel", "full", n) for n in range(first + 1, end if at_once else keys_end)]
                group += [("read", "panel", n) for n in range(first, keys_end)]
                group += [("arrive", "panel", "empty", n) for n in range(first, keys_end)]
                group += [("wait", "panel", "full", n) for n in range(keys_end, keys_end if at_once else end)]
                group += [("read", "step", step), ("read", f"bias {g}", t)]
                group += [("read", "panel", n) for n in range(first + key_panels, first + panels)]
                group += [("arrive", "panel", "empty", n) for n in range(first + key_panels, first + panels)]
            step += 1
    for t in range(len(sharers) + bias_places):
        exchange += [("wait", "bias", "empty", t)]
        if t < len(sharers):
            exchange += [("copy", "bias", "full", t, "bias 0", "bias 1")]
            look += [("wait", "bias", "full", t), ("read", "bias 0", t), ("write", "known", t), ("arrive", "known", "full", t)]
    return explore(rings, (load, exchange, look, *groups), f"{sharers} sharers",
                   {"panel": places, "step": steps, "bias 0": bias_places, "bias 1": bias_places, "known": bias_places})


def take_turns(blocks, key_blocks, row_tiles, heads, abreast, resident, causal, lag):
    """Deterministic: clusters of `blocks` begin in the order of their tickets, `resident` of them at once, add to dq of a tile from
    the last key block that sees it to the first, and each block passes a step's turn when it is `lag` steps further.  One of a pair
    needs the other's dS, whose place both have given back two steps before.  What one may do it may do until it does it, so one
    order tells of all."""
    tickets, walks = collections.Counter(), []
    for ticket in range(heads * key_blocks):
        line = ticket // abreast
        head, block = line // key_blocks * abreast + ticket % abreast, key_blocks - 1 - line % key_blocks
        lasts = [tile * key_blocks // row_tiles if causal else key_blocks - 1 for tile in range(row_tiles)]
        walks.append([((head, tile), last - block) for tile, last in enumerate(lasts) if last >= block])
    running = [(walk, (0,) * blocks) for walk in walks[:resident]]
    waiting = walks[resident:]
    while running:
        before, running = running, []
        for walk, added in before:
            now = list(added)
            for block, n in enumerate(added):
                if n < len(walk) and n < min(now) + 2 and tickets[walk[n][0]] // blocks == walk[n][1]:
                    now[block] += 1
                    if n >= lag:
                        tickets[walk[n - lag][0]] += 1
                elif n == len(walk):
                    for tile, _ in walk[-lag:]:
                        tickets[tile] += 1
                    now[block] += 1
            if min(now) <= len(walk):
                running.append((walk, tuple(now)))
            elif waiting:
                running.append((waiting.pop(0), (0,) * blocks))
        assert running != before, f"all wait for turns: {running}"


def end_dq(key_blocks, parts, heads, abreast, lag, places, resident, seed):
    """Blocks end dq: they begin in the order of their tickets, `resident` of them at once, and each goes on when it may, in any order.
    One with keys adds once its head's place has been cleared for it; one that ends a head's dq waits until all have added to it."""
    order, counted, open_to = random.Random(seed), collections.Counter(), {}
    tasks = []
    for ticket in range((heads + lag) * (key_blocks + parts)):
        row, line = ticket // abreast, ticket // abreast % (key_blocks + parts)
        turn = row // (key_blocks + parts) * abreast + ticket % abreast - (lag if line < parts else 0)
        if 0 <= turn < heads:
            tasks.append((turn, line < parts))
    running, tasks = tasks[:resident], tasks[resident:]
    while running:
        ready = [task for task in running if (counted[task[0]] >= key_blocks if task[1] else
                                              task[0] < places or counted[task[0] - places] == key_blocks + parts)]
        assert ready, f"all wait: {running}"
        turn, ends = task = order.choice(ready)
        if not ends:
            assert open_to.setdefault(turn % places, turn) == turn, f"head {turn} adds to the sums of head {open_to[turn % places]}"
        counted[turn] += 1
        if counted[turn] == key_blocks + parts:
            del open_to[turn % places]
        running.remove(task)
        running += tasks[:1]
        del tasks[:1]
    assert all(counted[turn] == key_blocks + parts for turn in range(heads))


if __name__ == "__main__":
    cases = list(itertools.product((1, 3), (1, 2), (1, 2, 4), (1, 2), (0, 1, 3), (1, 2, 7), range(5)))
    for key_blocks, parts, abreast, lag, more, resident, seed in cases:
        end_dq(key_blocks, parts, 12, abreast, lag * abreast, (lag + more) * abreast, resident, seed)
    print(f"dq ended by blocks: {len(cases)} grids, nobody waits for ever, no sums are mixed")
    cases = list(itertools.product((1, 2), (1, 3, 5), (5, 8), (1, 2, 4), (1, 2, 3, 7), (False, True), (1, 2)))
    for blocks, key_blocks, row_tiles, abreast, resident, causal, lag in cases:
        take_turns(blocks, key_blocks, row_tiles, 8, abreast, resident, causal, lag)
    print(f"turns: {len(cases)} grids, nobody waits for ever")
    counts = [turns(tiles, lag) for tiles in (0, 1, 2, 5, 12) for lag in (1, 2)]
    print(f"turns passed by a warp of its own: {sum(counts)} states of {len(counts)} walks, nobody waits for ever, no step is overwritten")
    try:
        turns(12, 2, places=2)
    except AssertionError as fault:
        assert "step is overwritten" in str(fault)
    else:
        raise AssertionError("with two places for turns and two steps between, a step should be overwritten")
    counts = [held(tiles) for tiles in itertools.chain.from_iterable(itertools.product(range(4 - keys // 2), repeat=keys) for keys in (1, 2, 3))]
    print(f"all keys of a block, dq held: {sum(counts)} states of {len(counts)} walks, nobody waits for ever")
    tasks = [[1, 1, 1, 1, 1], [2, None, 1, 1], [None, None, 1], [0, 1, None, 0, 1], [3, 1, None, 1], [1, None, 1, None, 1, 1]]
    counts = [going_on(of, 2, v_places) for of in tasks for v_places in (1, 2)]
    print(f"one task after the other: {sum(counts)} states of {len(counts)} walks, nobody waits for ever, no task is overwritten")
    for name, *of in (("d 128", 2, 4, 5, 2, True), ("d 128, an fp32 bias", 2, 4, 5, 1, True), ("d 64", 1, 2, 4, 2, True),
                      ("d 64, dv 128", 1, 3, 5, 2, True), ("d 128, a mask", 2, 4, 4, 2, False), ("d 256", 4, 8, 5, 2, False)):
        counts = [bias_gradient(*of, sharers) for sharers in ((1,), (3,), (1, 1), (2, 1), (1, 1, 1))]
        print(f"a bias's gradient, {name}: {sum(counts)} states of {len(counts)} walks, nobody waits for ever")
    own = [(f"keys of their own{', looking ahead' if ahead else ''}{bias}", own_keys(places, ahead), most) for ahead in (False, True)
           for bias, places, most in (("", 0, 6), (", a bias with one place", 1, 5), (", a bias with two", 2, 4))]
    for name, model, most in (*own, ("shared keys, a bias", shared_keys(True, bias=1), 2),
                              ("shared keys", shared_keys(False), 3),
                              ("shared keys, hidden entries", shared_keys(True), 3),
                              ("shared keys, hidden entries that are not finite", shared_keys(True, True), 5)):
        counts = [model.explore(tiles) for tiles in range(most + 1)]
        print(f"{name}: {functools.reduce(int.__add__, counts)} states of 0 to {most} tiles, nobody waits for ever")
