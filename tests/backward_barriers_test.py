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
#: Of a script: the barrier to pass; what nobody may be at: (who, the places in its script, what is wrong then), or of the copies
#: under way (None, their bits, what is wrong); the same once it is passed; what has to lie where: (place, use, name); then what is
#: done: an arrival, a copy, writes; and where the script goes on.
Step = collections.namedtuple("Step", "wait never never_then lies arrive copy writes then", defaults=(None, (), (), (), None, 0, (), 0))
#: Of a ring: places, arrivals that fill a place, arrivals that empty it.
OWN_KEYS = {"q": (2, 1, 2), "dout": (2, 1, 2), "dS": (2, 2, 1)}
#: A block's dS is there when it and the other one's are, and is given back by both; "other dS" is the other block's.
SHARED_KEYS = {"q": (2, 1, 2), "dout": (1, 1, 1), "P": (2, 1, 1), "looked": (2, 1, 1), "dS": (2, 2, 2), "other dS": (2, 2, 2)}


class Barriers:
    """Rings of mbarriers in one number, four bits each: the parity of the phase, and how many have arrived."""

    def __init__(self, rings):
        self.rings = rings
        names = [(ring, side, place) for ring in rings for side in ("full", "empty") for place in range(rings[ring][0])]
        self.shifts = {name: 4 * at for at, name in enumerate(names)}

    def arrival(self, ring, side, n):
        """Where the barrier is, and from which state on an arrival is the last one."""
        places, *arrivals = self.rings[ring]
        return self.shifts[ring, side, n % places], 2 * (arrivals[side == "empty"] - 1)

    def wait(self, ring, side, n):
        """Where the barrier is, and the parity at which one waits."""
        places = self.rings[ring][0]
        return self.shifts[ring, side, n % places], n // places & 1 ^ (side == "empty")


class Copies:
    """Those under way, a bit each."""

    def __init__(self, barriers):
        self.barriers, self.bits, self.arrivals = barriers, {}, {}

    def __call__(self, ring, side, n):
        bit = 1 << self.bits.setdefault((ring, side, n), len(self.bits))
        self.arrivals[bit] = self.barriers.arrival(ring, side, n)
        return bit


def arrived(barriers, shift, last):
    state = barriers >> shift & 15
    return barriers + ((state & 1 ^ 1) - state << shift if state >= last else 2 << shift)


def walk(scripts, copies, lies, what):
    """Each actor is a list of steps, the last of which is None; how many states there are."""
    ends = tuple(len(script) - 1 for script in scripts)
    start = (0, (0,) * len(scripts), 0, lies)
    seen, todo = {start}, collections.deque([start])
    while todo:
        barriers, at, under_way, lies = state = todo.popleft()
        following, left = [], under_way
        while left:
            copy = left & -left
            left ^= copy
            following.append((arrived(barriers, *copies.arrivals[copy]), at, under_way ^ copy, lies))
        for who, script in enumerate(scripts):
            step = script[at[who]]
            if step is None:
                continue
            wait, never, never_then, lie, arrive, copy, writes, then = step
            passes = wait is None or barriers >> wait[0] & 1 != wait[1]
            for other, places, fault in (*never, *never_then) if passes else never:
                assert not (under_way & places if other is None else at[other] in places), f"with {what} {fault}"
            if not passes:
                continue
            for place, n, name in lie:
                assert lies[place] == n, f"with {what} {name} is overwritten"
            now = at[:who] + (then,) + at[who + 1:]
            there = lies
            for place, n in writes:
                there = there[:place] + (n,) + there[place + 1:]
            following.append((arrived(barriers, *arrive) if arrive else barriers, now, under_way | copy, there))
        assert following or at == ends, f"with {what} all wait: {state}"
        fresh = set(following) - seen
        seen |= fresh
        todo.extend(fresh)
    return len(seen)


class Model:
    """`rings` with their barriers; `actors`: of each, what it does in a tile, and what behind the last one.  The first thing is
    to wait; it then knows whether there is a tile."""

    def __init__(self, rings, actors):
        self.rings = rings
        self.actors = actors

    def explore(self, tiles):
        """How many states there are."""
        barriers = Barriers(self.rings)
        copies = Copies(barriers)

        def readers(ring, n):
            """Who may still read use n of a ring, or of another place of as many."""
            found = []
            for who, (script, _) in enumerate(self.actors, start=1):
                last = [i for i, does in enumerate(script) if does in (("free", ring), ("read", ring))]
                if last and 0 <= n < tiles:
                    found.append((who, range(n * len(script) + 1, n * len(script) + last[0] + 1), f"{ring} is overwritten"))
            if ring == "dS" and "other dS" in self.rings:
                found.append((None, copies("other dS", "full", n), f"{ring} is overwritten"))  # from there
            return tuple(found)

        def overwritten(n):
            """Who is at the step that takes the place of step n."""
            found = []
            for who, (script, end) in enumerate(self.actors, start=1):
                places = set()
                for place in range(tiles * len(script) + len(end) + 2):
                    at, does = divmod(min(place, tiles * len(script)), len(script))
                    users = [at] if 0 < does else []
                    users += [at - 1] if script[0][1] == "dS" else []  # in turns it passes the last step's later than it adds
                    if not all(at == n + 1 or (at - n - 1) % STEPS for at in users):
                        places.add(place)
                if places and script[0][1] in ("q", "dS"):
                    found.append((who, frozenset(places), "a step is overwritten"))
            return tuple(found)

        loads, producer = [ring for ring in ("q", "bias", "dout") if ring in self.rings], []
        for n in range(tiles):
            for ring in loads:
                producer.append(Step(barriers.wait(ring, "empty", n), never_then=readers(ring, n - self.rings[ring][0]),
                                     copy=copies(ring, "full", n), then=len(producer) + 1))
            producer.append(Step(never=overwritten(n), then=len(producer) + 1))
        producer.append(Step(barriers.wait("q", "empty", tiles), never_then=readers("q", tiles - self.rings["q"][0]),
                             arrive=barriers.arrival("q", "full", tiles), then=len(producer) + 1))
        scripts = [[*producer, None]]
        for script, end in self.actors:
            lines = [(n, does) for n in range(tiles) for does in range(len(script))]
            lines += [(tiles, 0), *((tiles, len(script) + does) for does in range(len(end)))]
            steps = []
            for place, (n, does) in enumerate(lines):
                never = ()
                act, ring, *more = (script + end)[does]
                while act in ("read", "write"):  # until the next thing is done: who reads for the last time, somebody else gives it back
                    never += readers(ring, n - (more[0] if more else 2)) if act == "write" else ()
                    place, does = place + 1, does + 1
                    act, ring, *more = (script + end)[does]
                steps.append(Step(
                    barriers.wait(ring, more[0], n + (more[1] if len(more) > 1 else 0)) if act == "wait" else None, never,
                    arrive=barriers.arrival(ring, {"fill": "full", "free": "empty"}[act], n) if act in ("fill", "free") else None,
                    copy=copies(ring, "full", n) if act == "send" else 0,  # by the copy engine; what is added is of the tile that its step names
                    then=place + 1))
            scripts.append([*steps, None])
        return walk(scripts, copies, (), f"{tiles} tiles")


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


def explore(rings, actors, what, places=None):
    """Each actor is a list of what it does; how many states there are.  places: of what is written and read as use n of it; a read
    is as late as it may be, a copy is there as soon as it is asked for."""
    places = places or {}
    barriers, names = Barriers(rings), [(name, place) for name in places for place in range(places[name])]
    copies, index = Copies(barriers), {name: at for at, name in enumerate(names)}

    def lies_at(name, n):
        return index[name, n % places[name]]

    scripts = []
    for actor in actors:
        script = []
        for at in range(len(actor)):
            does = next((i for i in range(at, len(actor)) if actor[i][0] != "read"), len(actor))
            if does == len(actor):
                script.append(Step(then=does))
                continue
            act, *of = actor[does]
            step = Step(lies=tuple((lies_at(name, n), n, name) for _, name, n in actor[at:does]), then=does + 1)
            if act == "wait":
                step = step._replace(wait=barriers.wait(*of))
            elif act == "arrive":
                step = step._replace(arrive=barriers.arrival(*of))
            elif act == "copy":
                step = step._replace(copy=copies(*of[:3]), writes=tuple((lies_at(name, of[2]), of[2]) for name in of[3:]))
            elif act == "write":
                name, n, *as_what = of
                step = step._replace(writes=((lies_at(name, n), as_what[0] if as_what else n),))
            script.append(step)
        scripts.append([*script, None])
    return walk(scripts, copies, (None,) * len(names), what)


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
