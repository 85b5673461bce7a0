"""Many prompts: the same pictures whatever the number of processes and of interruptions."""

from __future__ import annotations

import errno
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

import layercache
from layercache._utils.files import followed
from layercache.demo import pipeline
from layercache.errors import (
    ArgumentError,
    CrewError,
    FileFormatError,
    LayerCacheWarning,
    MissingExtraError,
    OutputError,
    ScheduleMismatchError,
)
from layercache.parallel.crew import Crew
from layercache.tools.batch.entries import Entry, check_arguments, numbered, read_lines, slug_of
from layercache.tools.batch.manifest import NAME, Made, Manifest
from layercache.tools.batch.run import generate_all
from layercache.tools.cli import results
from support import batch_tasks, tiny
from support.batch_tasks import PROMPTS, QUICK, NoisePipeline, at, content_of, interrupt, lines_of, noise
from support.commands import done, refused, run
from support.crews import one_thread, run_crew


def make(pipe, entries, folder, call=QUICK, **more):
    return generate_all(pipe, entries, folder, call, progress=False, **more)


@pytest.fixture(scope="module", autouse=True)
def thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that nothing stopped, in one process."""
    folder = tmp_path_factory.mktemp("reference")
    assert noise(folder) == PROMPTS
    return content_of(folder)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crew")
    names = ("cached", "stopped", "command", "others", "leader_killed")
    found = run_crew([partial(getattr(batch_tasks, name), folder=folder) for name in names], 2, folder)
    return folder, dict(zip(names, found, strict=True))


# --- processes, and interruptions ----------------------------------------------------------------------------------


def test_two_processes_make_the_same_as_one(of_two):
    folder, results_of_two = of_two
    alone = batch_tasks.cached(Crew(), folder)
    pictures, lines = content_of(folder / "cached-1")
    assert (pictures, lines) == content_of(folder / "cached-2")
    assert sorted(pictures) == [
        f"0000{k}-{name}.png" for k, name in ((0, "cat"), (1, "coffee"), (3, "rocket"), (4, "flower"))
    ]
    assert alone.count == 5 and alone.made == 4 and "'unicorn' is not one of" in alone.failures[2]
    for batch in results_of_two["cached"]:
        assert (batch.made, batch.failures, batch.psnr, batch.used) == (4, alone.failures, alone.psnr, alone.used)


def test_a_picture_is_that_of_its_prompt_and_seed_alone(of_two):
    """As a call of the pipeline by hand makes it, with the PSNR against the full run."""
    folder, _ = of_two
    pipe = tiny.tiny_pipeline()
    schedule = tiny.schedule_for(pipe, tiny.mixed_cells(batch_tasks.STEPS))
    line = lines_of(folder / "cached-2")[3]
    full = tiny.generate(pipe, ["rocket"], seed=3, output_type="np")
    with layercache.enabled(pipe, schedule) as cache:
        drawn = tiny.generate(pipe, ["rocket"], seed=3, output_type="np")
        assert line["used"] == cache.report().used
    expected = 10 * np.log10(1 / np.mean((full.astype(float) - drawn) ** 2))
    assert line["psnr"] == pytest.approx(expected, abs=1e-4) and line["seed"] == 3 and line["full_seconds"] > 0
    saved = np.asarray(PIL.Image.open(folder / "cached-2" / line["file"]))
    assert np.array_equal(saved, (drawn[0] * 255).round().astype("uint8"))


@pytest.mark.parametrize(("name", "left"), [("stopped", PROMPTS[3:]), ("killed", PROMPTS[4:])])
def test_what_two_processes_left_is_made_by_one(of_two, reference, name, left):
    folder, results_of_two = of_two
    assert results_of_two["stopped"] == ["stopped"] * 2
    died, lost = results_of_two["leader_killed"]
    assert died is None and isinstance(lost, CrewError)
    assert noise(folder / name) == left
    assert content_of(folder / name) == reference


def test_the_command_of_two_processes_speaks_once(of_two):
    folder, results_of_two = of_two
    (code, output, _), other = results_of_two["command"]
    assert code == 1 and other == (1, "", "") and "(2 of 3; 2 made now" in output and "1 failed" in output
    assert [line.get("file") for line in lines_of(folder / "command")] == ["00000-cat.png", None, "00002-coffee.png"]


def test_processes_with_other_prompts_are_refused(of_two):
    folder, results_of_two = of_two
    assert all(found.startswith("process 1 has another model") for found in results_of_two["others"])
    assert not (folder / "others").exists()


def test_ctrl_c_loses_what_was_in_flight_and_no_more(tmp_path, reference):
    with pytest.raises(KeyboardInterrupt):
        noise(tmp_path, at(PROMPTS[2], interrupt))
    assert noise(tmp_path) == PROMPTS[2:]
    assert noise(tmp_path) == [] and content_of(tmp_path) == reference


# --- prompts that fail ---------------------------------------------------------------------------------------------


def failing(error):
    def act():
        raise error

    return at("one", act)


def test_a_prompt_that_fails_is_noted_and_tried_again(tmp_path, reference):
    entries = numbered(PROMPTS, 3)
    batch = make(NoisePipeline(failing(RuntimeError("out of\x1b luck"))), entries, tmp_path)
    assert batch.failures == {3: r"RuntimeError: out of\x1b luck"} and batch.made == 6
    assert lines_of(tmp_path)[3]["error"] == batch.failures[3] and not list(tmp_path.glob("00003*"))
    pipe = NoisePipeline()
    assert make(pipe, entries, tmp_path).failures == {} and pipe.seen == ["one"]
    assert content_of(tmp_path) == reference


def test_the_prompt_of_one_that_failed_may_be_corrected(tmp_path):
    picture = tmp_path / "in.png"
    entries = [Entry({"prompt": "a", "image": "in.png"}, 0, tmp_path), *numbered(["b"])]
    batch = make(NoisePipeline(), entries, tmp_path / "out")
    assert "in.png" in batch.failures[0] and batch.made == 1
    PIL.Image.new("RGB", (8, 8), (255, 255, 255)).save(tmp_path / "other.png")
    entries[0] = Entry({"prompt": "a", "image": "other.png"}, 0, tmp_path)
    assert make(NoisePipeline(), entries, tmp_path / "out").made == 1
    bright = np.asarray(PIL.Image.open(tmp_path / "out" / "00000-a.png"))
    assert bright.min() > 120 and not picture.exists()


def test_an_input_that_was_changed_makes_the_picture_anew(tmp_path):
    for name in ("first.png", "second.png"):
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / name)
    entries = [Entry({"prompt": name, "image": name}, 0, tmp_path) for name in ("first.png", "second.png")]
    make(NoisePipeline(), entries, tmp_path / "out")
    PIL.Image.new("RGB", (8, 8), (255, 255, 255)).save(tmp_path / "second.png")
    pipe = NoisePipeline()
    make(pipe, entries, tmp_path / "out")
    assert pipe.seen == ["second.png"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), MissingExtraError("the pipeline needs ftfy"), CrewError("lost")],
)
def test_what_would_fail_for_every_prompt_stops(tmp_path, error):
    pipe = NoisePipeline(failing(error))
    with pytest.raises(type(error), match=str(error.args[-1])):
        make(pipe, numbered(PROMPTS), tmp_path)
    assert pipe.seen == PROMPTS[:4]


def test_a_disk_that_is_full_stops_and_keeps_what_is_whole(tmp_path, monkeypatch, reference):
    from layercache.tools.batch import manifest

    def full(path, line):
        if "東京" in line:
            with path.open("a") as file:  # as much as there was room for
                file.write(line[:30])
            raise OutputError(f"{path} cannot be written: No space left on device")

    append = manifest.append_line
    with monkeypatch.context() as patched:
        patched.setattr(manifest, "append_line", lambda path, line: full(path, line) or append(path, line))
        with pytest.raises(OutputError, match="No space left"):
            noise(tmp_path)
    assert noise(tmp_path) == PROMPTS[2:] and content_of(tmp_path) == reference


class NaNPipeline(NoisePipeline):
    def __call__(self, prompt, num_inference_steps=2, generator=None, output_type="pil"):
        self.seen.append(prompt)
        bad = prompt == "bad" or (prompt == "once" and self.seen.count("once") == 1)
        return SimpleNamespace(images=np.full((1, 8, 8, 3), np.nan if bad else 0.5))


def test_a_picture_of_nan_is_a_failure(tmp_path, monkeypatch):
    batch = make(NaNPipeline(), numbered(["good", "bad"]), tmp_path)
    assert batch.failures == {1: "the pipeline gave a picture with NaN or infinity in it"}


def test_what_overflowed_is_tried_once_more_on_the_same_cache(tmp_path, monkeypatch):
    opened = []

    class Cache:
        def __enter__(self):
            opened.append(self)
            return self

        def __exit__(self, *error):
            return None

        def check(self):
            raise layercache.errors.NonFiniteResidualError("a stored residual held NaN")

        def report(self):
            return SimpleNamespace(used=0.5)

    monkeypatch.setattr(layercache, "enabled", lambda pipe, plan: Cache())
    pipe = NaNPipeline()
    batch = make(pipe, numbered(["once", "bad"]), tmp_path, schedule="a plan")
    assert batch.failures == {1: "NonFiniteResidualError: a stored residual held NaN"} and batch.used == 0.5
    assert pipe.seen == ["once", "once", "bad", "bad"] and len(opened) == 3  # and one to see whether the schedule fits


# --- the folder ----------------------------------------------------------------------------------------------------


def test_what_is_missing_or_changed_is_made_again(tmp_path, reference):
    noise(tmp_path)
    pictures = sorted(reference[0])
    (tmp_path / pictures[1]).unlink()
    (tmp_path / pictures[4]).write_bytes(b"another")
    assert noise(tmp_path) == [PROMPTS[1], PROMPTS[4]] and content_of(tmp_path) == reference


def test_a_last_line_that_was_cut_off_is_no_damage(tmp_path, reference, recwarn):
    noise(tmp_path)
    whole = (tmp_path / NAME).read_bytes()
    for cut in (whole[:-1], whole[:-40], whole + b"\0" * 10):
        (tmp_path / NAME).write_bytes(cut)
        assert noise(tmp_path) == (PROMPTS[-1:] if len(cut) < len(whole) else [])
        assert content_of(tmp_path) == reference
    assert not [one for one in recwarn if issubclass(one.category, LayerCacheWarning)]


def test_a_line_that_was_changed_is_said_and_its_picture_made_again(tmp_path, reference):
    noise(tmp_path)
    text = (tmp_path / NAME).read_text()
    (tmp_path / NAME).write_text(text.replace('"two"', '"zwei"'))
    with pytest.warns(LayerCacheWarning, match="1 line of .* changed after"):
        assert noise(tmp_path) == ["two"]
    assert content_of(tmp_path) == reference
    (tmp_path / NAME).write_text(text.replace('"version": 1', '"version": 2', 1))
    with pytest.raises(FileFormatError, match="first line was changed; name another folder"):
        noise(tmp_path)


def test_a_folder_of_other_pictures_is_refused(tmp_path):
    pipe, entries = tiny.tiny_pipeline(2), numbered(["cat", "rocket"])
    schedule = layercache.Schedule.compute_all(tiny.fingerprint(pipe.transformer, tiny.shifted_sigmas(2)))
    call = {"num_inference_steps": 2}
    make(pipe, entries, tmp_path, call)
    before = content_of(tmp_path)
    for words, other in (
        (
            "another number of steps or other arguments",
            lambda: make(pipe, entries, tmp_path, {"num_inference_steps": 3}),
        ),
        ("another schedule", lambda: make(pipe, entries, tmp_path, call, schedule=schedule)),
        ("another model or sampler", lambda: make(tiny.tiny_pipeline(2, seed=5), entries, tmp_path, call)),
        ("prompt 1 with another text", lambda: make(pipe, numbered(["cat", "flower"]), tmp_path, call)),
        ("prompt 0 with another text, seed", lambda: make(pipe, numbered(["cat"], seed=1), tmp_path, call)),
    ):
        with pytest.raises(ScheduleMismatchError, match=words) as caught:
            other()
        assert caught.value.argument == "output"
    assert content_of(tmp_path) == before
    assert make(pipe, [*entries, *numbered(["flower"], 2)], tmp_path, call).made == 1  # added behind the last one


def test_psnr_is_made_up_for_where_it_was_not_asked_for_before(tmp_path):
    pipe, entries = tiny.tiny_pipeline(2), [Entry({"prompt": "cat"}, 0, category="animals")]
    schedule = layercache.Schedule.compute_all(tiny.fingerprint(pipe.transformer, tiny.shifted_sigmas(2)))
    assert make(pipe, entries, tmp_path, {"num_inference_steps": 2}, schedule=schedule).psnr == ()
    batch = make(pipe, entries, tmp_path, {"num_inference_steps": 2}, schedule=schedule, compare=True)
    assert batch.made == 1 and batch.psnr == (float("inf"),) and lines_of(tmp_path)[0]["psnr"] == "inf"
    assert batch.by_category == {"animals": batch.psnr} and lines_of(tmp_path)[0]["category"] == "animals"


def test_a_schedule_that_does_not_fit_is_refused_before_the_first_prompt(tmp_path):
    other = tiny.schedule_for(tiny.tiny_pipeline(), tiny.mixed_cells(8))
    with pytest.raises(layercache.LayerCacheError, match="6 blocks"):
        make(tiny.tiny_pipeline(2), numbered(["cat"]), tmp_path / "out", schedule=other)
    assert not (tmp_path / "out").exists()


def test_the_manifest_ends_in_the_order_of_the_prompts(tmp_path):
    entries = numbered(PROMPTS)
    manifest = Manifest(tmp_path, {"model": "a"}, {"settings": {"steps": 2}}, entries)
    for number in (3, 1, 2, 0, 3):
        manifest.keep(number, Made({".png": b"x"}, 1.0))
    assert len(lines_of(tmp_path)) == 5
    manifest.finish()
    assert [line["number"] for line in lines_of(tmp_path)] == [0, 1, 2, 3]
    manifest.keep(4, Made(error="no"))
    again = Manifest(tmp_path, {"model": "a"}, {"settings": {"steps": 3}}, entries)
    assert again.left(False) == [4, 5, 6] and again.head["settings"] == {"steps": 2}


def test_a_leader_on_another_machine_sends_what_it_writes(tmp_path, reference):
    """It has the manifest alone to go on from; lines are sent as they are added, never all of them again."""
    here, there, sent = tmp_path / "here", tmp_path / "there", []

    def send(path, line):
        copy = here / path.relative_to(there)
        copy.parent.mkdir(exist_ok=True)
        sent.append(len(line.encode()) if line is not None else path.stat().st_size if path.name == NAME else 0)
        with copy.open("wb" if line is None else "ab") as file:
            file.write(path.read_bytes() if line is None else line.encode())

    with followed(send):
        for _ in range(2):
            make(NoisePipeline(), numbered(PROMPTS[:5], 3), there, look=False)
            for path in there.glob("*.png"):
                path.unlink()
        make(pipe := NoisePipeline(), numbered(PROMPTS, 3), there, look=False)
    assert pipe.seen == PROMPTS[5:] and content_of(here) == reference
    assert sum(sent) == (there / NAME).stat().st_size


# --- videos --------------------------------------------------------------------------------------------------------


class VideoPipeline:
    def __call__(self, prompt, num_inference_steps=2, num_frames=3, generator=None, output_type="pil"):
        frames = torch.rand(1, 3, 8, 8, 3, generator=generator).numpy()
        return SimpleNamespace(frames=frames, audio=torch.zeros(1, 2, 50))


def test_a_video_and_its_sound(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "has_ffmpeg", lambda: False)
    make(VideoPipeline(), numbered(["a fox"]), tmp_path, frame_rate=10.0)
    line = lines_of(tmp_path)[0]
    assert list(line["files"]) == ["00000-a-fox.gif", "00000-a-fox.wav"] and line["file"] == "00000-a-fox.gif"
    with PIL.Image.open(tmp_path / line["file"]) as picture:
        assert (picture.n_frames, picture.info["duration"]) == (3, 100)
    with pytest.raises(ScheduleMismatchError, match="another format"):
        make(VideoPipeline(), numbered(["a fox"]), tmp_path, frame_rate=20.0)


# --- files of prompts ----------------------------------------------------------------------------------------------


def test_json_lines_are_arguments_of_the_call(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        '{"prompt": "a\u2028b", "seed": 7, "strength": 0.25}',
        "",
        '{"prompt": "two", "image": ["x.png", "y.png"]}',
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    first, second = read_lines(path, seed=10)
    assert (first.arguments, first.seed) == ({"prompt": "a\u2028b", "strength": 0.25}, 7)
    assert (second.seed, second.inputs(), second.folder) == (11, {"image": ["x.png", "y.png"]}, tmp_path)
    for name in ("x.png", "y.png"):
        PIL.Image.new("L", (4, 4)).save(tmp_path / name)
    assert [picture.mode for picture in second.call()["image"]] == ["RGB", "RGB"]
    check_arguments(NoisePipeline(), [first, second])
    with pytest.raises(
        ArgumentError, match=r"takes no strenght \(prompt 1\); its arguments are prompt, image, strength"
    ):
        check_arguments(NoisePipeline(), [first, Entry({"prompt": "x", "strenght": 1}, 0)])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a fox", "it is no JSON object"),
        ('["a fox"]', "expected an object"),
        ('{"prompt": "x", "guidance_scale": NaN}', "it is no JSON object"),
        ('{"prompt": "\\ud800"}', "it is no JSON object"),
        ('{"prompt": ["x", "y"]}', "give a line per picture"),
        ('{"prompt": "x", "seed": -1}', "at least 0, got -1"),
        ('{"prompt": "x", "seed": true}', "at least 0, got True"),
        ('{"seed": 1}', "it has no prompt"),
        ('{"prompt": "x", "generator": 1}', "generator is set by the command"),
        ('{"prompt": "x", "num_inference_steps": 4}', "--steps sets it for all"),
        ('{"prompt": "x", "num_images_per_prompt": 2}', "give a line per picture, with a seed"),
    ],
)
def test_a_line_that_is_no_call_is_refused_by_its_number(tmp_path, line, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "x"}}\n{line}\n')
    with pytest.raises(FileFormatError, match="line 2: ") as caught:
        read_lines(path)
    assert said in str(caught.value) and caught.value.argument == "prompts_file"


def test_names_of_files():
    assert slug_of("Füchse: zwei, im Schnee!") == "fuchse-zwei-im-schnee" and slug_of("東京") == ""
    assert slug_of("../../etc/passwd\x00") == "etc-passwd"
    assert slug_of("word " * 20) == "-".join(["word"] * 8) and slug_of("x" * 90) == "x" * 40
    assert [Entry({"prompt": prompt}, 0).name(7) for prompt in ("東京", "a b")] == ["00007", "00007-a-b"]


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_demo(monkeypatch, tmp_path):
    pipe = tiny.tiny_pipeline(2)
    monkeypatch.setattr(pipeline, "load_demo_pipeline", lambda device=None: pipe)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("# two\ncat\n\ncoffee\n")
    return pipe


def test_the_command_makes_a_folder_and_goes_on(small_demo, tmp_path):
    words = ("generate", "--prompts-file", "prompts.txt", "--steps", 2, "--seed", 5)
    output = done(*words, "--fold-timesteps", "--json", "figures.json")
    assert "TimestepTables: 6 projections, 2 timesteps" in output
    assert "pictures: pictures (2 of 2; 2 made now" in output and "manifest: pictures/manifest.jsonl" in output
    assert [line["seed"] for line in lines_of(tmp_path / "pictures")] == [5, 6]
    drawn = tiny.generate(small_demo, ["coffee"], steps=2, seed=6, output_type="np")[0]
    saved = np.asarray(PIL.Image.open("pictures/00001-coffee.png"))
    assert np.array_equal(saved, (drawn * 255).round().astype("uint8"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["count"], figures["made"], figures["failures"]) == (2, 2, {})
    assert "none made now" in done(*words)
    assert "another number of steps" in refused(*words[:-4], "--steps", 3)


def test_the_command_fails_where_prompts_failed_and_says_how_to_go_on(small_demo, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "unicorn"}\n{"prompt": "cat", "guidance_scale": 2}\n')
    words = ("generate", "--prompts-file", "prompts.jsonl", "--steps", 2, "-o", "out")
    result = run(*words)
    assert result.exit_code == 1 and "1 failed; the same command tries them again:" in result.stdout
    assert "0: the pipeline refused its arguments: prompt 'unicorn' is not one of" in result.stdout

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(small_demo), "class_ids", interrupted)
    result = run(*words)
    assert result.exit_code == 130
    assert "What was made is in out; the same command goes on with the rest" in result.stderr


def test_options_that_do_not_go_with_many_prompts_or_with_one(small_demo):
    assert "give a --prompt, or a --prompts-file" in refused("generate")
    assert "give a --prompt, or a --prompts-file" in refused("generate", "-p", "cat", "--prompts-file", "prompts.txt")
    assert "give --prompts-file with it" in refused("generate", "-p", "cat", "--workers", 2)
    many = ("generate", "--prompts-file", "prompts.txt")
    assert "go into a folder" in refused(*many, "-o", "x.png")
    assert "needs a --schedule" in refused(*many, "--compare")
    assert "takes no num_frames" in refused(*many, "--num-frames", 3)
