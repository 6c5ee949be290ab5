"""Tests of results/evaluate.py, with the helpers of test_qsm.py."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import qsm
from envs import make_env
from results.evaluate import Evaluation, load_policy, main
from test_qsm import DAMAGES, Counter, checkpoint, fails, finished, quick, run_of

_ = finished  # a fixture: pytest finds it by its name


class Filmed(Counter):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


gym.register("Filmed-v0", Filmed)


def test_evaluation_of_a_saved_policy_is_the_one_of_the_run(tmp_path, capsys):
    changes = dict(env_id="Pendulum-v1", eval_every=60, eval_episodes=3, candidates=4)
    run = qsm.main(quick(tmp_path, **changes))
    for candidates in (None, 1):
        main(Evaluation(run, episodes=3, candidates=candidates))
        assert f"best of {candidates or 4}, no action noise" in capsys.readouterr().out
    files = (run / name for name in ("evaluate.csv", "evaluations.csv"))
    (title, *saved), of_the_run = (path.read_text().splitlines() for path in files)
    assert [title, *saved[:3]] == [of_the_run[0], *of_the_run[-3:]]
    assert saved[0].split(",")[4] != saved[3].split(",")[4]  # returns
    assert torch.equal(load_policy(run)[1].q_scale, checkpoint(run)["learner"][-2])


def test_the_average_is_evaluated_and_saved_not_the_score_network(tmp_path):
    """With a step of 0 it stays the first network."""
    flags = dict(env_id="Pendulum-v1", eval_every=30, eval_episodes=2, policy_tau=0.0)
    run = qsm.main(quick(tmp_path, **flags))
    rows = [row.split(",") for row in (run / "evaluations.csv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == ["0", "0", "30", "30", "60", "60"]
    assert rows[0][1:] == rows[2][1:] == rows[4][1:] and rows[1][1:] == rows[5][1:]
    saved = load_policy(run)[1].score_net.parameters()
    assert not any(map(torch.equal, saved, checkpoint(run)["learner"]))


def test_deterministic_evaluation_acts_with_noise_of_zeros(tmp_path):
    run = qsm.main(quick(tmp_path, env_id="Pendulum-v1"))
    for candidates in (1, 3):  # which are all equal
        main(Evaluation(run, episodes=2, candidates=candidates, deterministic=True))
    _, *rows = (run / "evaluate-deterministic.csv").read_text().splitlines()
    args, learner, _ = load_policy(run)
    schedule = qsm.make_schedule(args.beta_schedule, args.diffusion_steps)
    for i in range(2):
        env = make_env("Pendulum-v1")
        (obs, _), ended, total = env.reset(seed=1_000_001 + i), False, 0.0
        while not ended:
            obs = torch.as_tensor(obs, dtype=torch.float32)[None]  # (1, O)
            noise = torch.zeros(args.diffusion_steps + 1, 1, 1)
            action = qsm.act(learner, obs, noise, schedule, args)[0].numpy()
            obs, reward, _, ended, _ = env.step(action)
            total += reward
        for row in (rows[i], rows[2 + i]):
            assert float(row.split(",")[4]) == pytest.approx(total, rel=1e-4)


def test_command_line(finished):
    command = [sys.executable, str(Path(__file__).with_name("evaluate.py")), str(finished)]
    options = dict(capture_output=True, text=True, timeout=170)
    for flag in ("--episodes", "--candidates"):
        result = subprocess.run([*command, flag, "0"], **options)
        assert (result.returncode, len(result.stderr.strip().splitlines())) == (1, 1)
        assert "--episodes and --candidates must be at least 1" in result.stderr


@pytest.mark.parametrize("damage", sorted({*DAMAGES} - {"flipped"}))  # torch compares no checksum
def test_unusable_model_gets_one_line(damage, finished, capsys):
    DAMAGES[damage](finished / "model.pt")
    before = {path: path.read_bytes() for path in finished.iterdir()}
    fails(capsys, Evaluation(finished), "model.pt is damaged", main)
    assert before == {path: path.read_bytes() for path in finished.iterdir()}


def test_model_that_names_a_module_imports_it_only_if_asked(monkeypatch, tmp_path, capsys):
    """--env-id module:id, as gym.make takes it; the folder's name suits every file system."""
    code = "import gymnasium\ngymnasium.register('Toy-v0', 'test_qsm:Counter')"
    (tmp_path / "toy.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    run = qsm.main(quick(tmp_path / "runs", env_id="toy:Toy-v0"))
    assert run.name.startswith("toy-Toy-v0__qsm__1__")
    monkeypatch.delitem(sys.modules, "toy")
    fails(capsys, Evaluation(run), "add --env-id toy:Toy-v0", main)
    assert "toy" not in sys.modules
    main(Evaluation(run, env_id="toy:Toy-v0"))
    assert len((run / "evaluate.csv").read_text().splitlines()) == 1 + 10


def test_video_of_the_first_episode(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(os.environ, "MUJOCO_GL", "egl")  # evaluate.py sets it for good
    run = qsm.main(quick(tmp_path, env_id="Filmed-v0"))
    flags = Evaluation(run, episodes=2, video=True)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "moviepy", None)  # makes the import fail
        fails(capsys, flags, "cannot record, which needs moviepy.*Dependency", main)
    pytest.importorskip("moviepy", reason="an mp4 needs moviepy, which is optional")
    main(flags)
    video = run_of(run / "videos")
    assert video.name == "step-60-seed-1-episode-0.mp4"
    assert video.stat().st_size > 500
