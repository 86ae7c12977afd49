"""Time stamps of joined clips and of H.264 in AVI."""

import numpy as np
import pytest

from tsdsr_core.video.reading import read_clip
from tsdsr_core.video.writing import write_clip

from ..support.clips import look, make_clip


@pytest.mark.parametrize("sound", [None, "mp2"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_clips_joined_byte_by_byte_go_on(sound, suffix, tmp_path):
    part = make_clip(tmp_path / "part.ts", frames=12, sound=sound, options={"bf": "2"})
    (tmp_path / "both.ts").write_bytes(2 * part.read_bytes())
    clip = read_clip(tmp_path / "both.ts")
    write_clip(clip, tmp_path / f"out{suffix}", (48, 64), lambda rgb: rgb, lambda: None)
    found = look(tmp_path / f"out{suffix}")
    steps = np.diff(found.times)
    assert len(found.times) == 24, "the decoder drops none at the join"
    assert np.delete(steps, 11) == pytest.approx(1 / 25, abs=0.0011)
    assert 0.039 <= steps[11] < 0.15, "the next clip begins when the sound of the first has ended"
    assert len(found.sound) == 2 * len(look(part).sound)


def test_h264_with_b_frames_in_avi_does_not_go_back(tmp_path):
    source = make_clip(tmp_path / "in.avi", frames=15, sound=None, options={"bf": "3"})
    clip = read_clip(source)
    write_clip(clip, tmp_path / "out.mp4", (48, 64), lambda rgb: rgb, lambda: None)
    assert look(tmp_path / "out.mp4").times == pytest.approx([index / 25 for index in range(15)], abs=0.0011)
