import random

import pytest

from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.memory_plan import CAPTURE, COMPUTE, REUSE, lay_out
from layercache.schedule.schedule import Schedule


def random_schedule(seed: int, steps: int = 12, groups: int = 4) -> Schedule:
    rng = random.Random(seed)
    rows: list[tuple] = []
    for step in range(steps):
        row = []
        for group in range(groups):
            computed = [i for i in range(step) if rows[i][group] is None]
            if not computed or rng.random() < 0.4:
                row.append(None)
            else:
                chosen = rng.sample(computed[-3:], k=min(len(computed[-3:]), rng.choice([1, 2])))
                row.append({a: rng.uniform(-1, 2) for a in chosen})
        rows.append(tuple(row))
    sigmas = tuple(1 - i / steps for i in range(steps + 1))
    prints = Fingerprint("Model", "0", groups, sigmas, ("cond",), "0")
    return Schedule(prints, tuple((g, g + 1) for g in range(groups)), tuple(rows), (1.0,) * groups)


@pytest.mark.parametrize("seed", range(25))
def test_slots_hold_what_is_read(seed):
    """Replays the layout: every read finds the residual of its anchor, in both streams."""
    schedule = random_schedule(seed)
    layout = lay_out(schedule, has_text=True)
    images: dict[int, tuple[int, int]] = {}
    texts: dict[int, tuple[int, int]] = {}
    for step, row in enumerate(layout.rows):
        for slot, key in row.reads:
            assert images[slot] == key
        for group, run in enumerate(row.runs):
            if run is None:
                continue
            first = group
            while first and schedule.cells[step][first - 1] is not None:
                first -= 1
            expected = [
                ((a, g), c)
                for g in range(first, group + 1)
                for a, c in sorted(schedule.cells[step][g].items(), reverse=True)
            ]
            assert [images[s] for s in run.image_slots] == [key for key, _ in expected]
            assert list(run.coefficients) == [c for _, c in expected]
            if group == len(schedule.groups) - 1:
                assert run.text_slots is None, "nothing reads the text behind the last group"
            else:
                assert [texts[s] for s in run.text_slots] == [key for key, _ in expected]
        for group, slots in enumerate(row.captures):
            if slots is not None:
                images[slots[0]] = (step, group)
                if slots[1] is not None:
                    texts[slots[1]] = (step, group)


@pytest.mark.parametrize("seed", range(25))
def test_slots_are_as_few_as_live_residuals(seed):
    """The number of slots equals the largest number of residuals alive at once."""
    schedule = random_schedule(seed)
    layout = lay_out(schedule, has_text=True)
    last: dict[tuple[int, int], int] = {}
    for step, row in enumerate(schedule.cells):
        for group, cell in enumerate(row):
            for anchor in cell or ():
                last[anchor, group] = step
    alive = [sum(a <= step <= end for (a, _), end in last.items()) for step in range(schedule.num_steps)]
    assert layout.image_slots == max(alive, default=0)


def test_nothing_is_stored_that_is_never_read():
    schedule = Schedule.compute_all(Fingerprint("Model", "0", 6, (1.0, 0.5, 0.0), ("cond",), "0"))
    layout = lay_out(schedule, has_text=True)
    assert (layout.image_slots, layout.text_slots) == (0, 0)
    assert all(action.kind == COMPUTE for row in layout.rows for action in row.actions)


def test_text_is_kept_only_for_a_computed_reader():
    prints = Fingerprint("Model", "0", 3, (1.0, 0.7, 0.4, 0.0), ("cond",), "0")
    groups = ((0, 1), (1, 2), (2, 3))
    whole = Schedule(prints, groups, ((None,) * 3, ({0: 1.0},) * 3, (None,) * 3), (1.0,) * 3)
    layout = lay_out(whole, has_text=True)
    assert layout.text_slots == 0
    assert [a.kind for a in layout.rows[1].actions] == [REUSE] * 3
    assert [a.ends_run for a in layout.rows[1].actions] == [False, False, True]
    prefix = Schedule(prints, groups, ((None,) * 3, ({0: 1.0}, {0: 1.0}, None), (None,) * 3), (1.0,) * 3)
    layout = lay_out(prefix, has_text=True)
    assert layout.text_slots == 2
    assert [a.kind for a in layout.rows[0].actions] == [CAPTURE, CAPTURE, COMPUTE]
    assert lay_out(prefix, has_text=False).text_slots == 0
