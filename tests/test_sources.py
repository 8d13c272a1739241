"""Sources: what a file, a folder or a camera gives, and what is said when it does not."""

from __future__ import annotations

import functools
import http.server
import os
import threading
import time
from itertools import count, pairwise, repeat

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mjpeg_server import jpeg, mjpeg_server, wait
from PIL import Image
from streams import picture, write_video

from edge.clock import SystemClock
from edge.errors import SourceError, UsageError
from edge.sources import SourceUrl, mask_secrets, open_source
from edge.sources.camera import CameraSource, url_camera
from edge.sources.file import MediaTimeline, VideoFileSource
from edge.sources.images import natural_key

CLOCK = SystemClock()
NTSC = 30000 / 1001


def read_all(source):
    frames = []
    while (frame := source.read()) is not None:
        frames.append(frame)
    source.close()
    return frames


# Video files


@pytest.mark.parametrize(
    "name, codec, fps", [("a.mp4", "mp4v", NTSC), ("a.avi", "MJPG", NTSC), ("a.mp4", "mp4v", 25.0)]
)
def test_a_video_file_gives_its_frames_at_their_times(tmp_path, name, codec, fps):
    pictures = [picture(5 * i) for i in range(40)]
    source = VideoFileSource(write_video(tmp_path / name, pictures, fps, codec))
    info = source.open()
    frames = read_all(source)
    assert (info.width, info.height, len(frames)) == (64, 48, 40)
    assert info.fps == pytest.approx(fps, rel=1e-3) and info.duration_s == pytest.approx(40 / fps, rel=1e-3)
    np.testing.assert_allclose([f.media_time_s for f in frames], np.arange(40) / fps, atol=1e-3)
    reds = [float(f.pixels[..., 0].mean()) for f in frames]
    np.testing.assert_allclose(reds, np.arange(40) * 5, atol=6)
    assert all(f.pixels[..., 2].mean() < 6 for f in frames), "blue and red are swapped"
    assert (source.ending.frames_read, source.ending.frames_announced, source.ending.early) == (40, 40, False)


def test_a_video_that_changes_size_midway_is_read_to_its_end(tmp_path):
    """Some builds of OpenCV scale the later pictures to the first size, others give them in their own."""
    path = tmp_path / "sizes.mjpeg"
    path.write_bytes(b"".join([jpeg(90)] * 6 + [jpeg(150, 40, 100)] * 6))
    source = VideoFileSource(path)
    source.open()
    frames = read_all(source)
    assert [round(float(frame.pixels.mean()), -1) for frame in frames] == [90] * 6 + [150] * 6
    assert {frame.pixels.shape for frame in frames} <= {(48, 64, 3), (40, 100, 3)}


def test_a_video_that_ends_early_says_how_much_of_it_came(tmp_path):
    path = write_video(tmp_path / "a.avi", [picture(3 * i) for i in range(60)], 25.0, "MJPG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = VideoFileSource(path)
    source.open()
    read = len(read_all(source))
    assert 0 < read < 60
    assert (source.ending.frames_read, source.ending.frames_announced, source.ending.early) == (read, 60, True)


def test_damaged_pictures_in_a_video_are_left_out_and_the_others_keep_their_times(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (50, 48, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.avi", noise, 25.0, "MJPG")
    content = bytearray(path.read_bytes())
    starts = [at for at in range(len(content) - 3) if content[at : at + 3] == b"\xff\xd8\xff"]
    assert len(starts) == 50
    for number in range(20, 28):
        content[starts[number] : starts[number] + 700] = bytes(700)
    path.write_bytes(content)
    source = VideoFileSource(path)
    source.open()
    times = [round(frame.media_time_s * 25) for frame in read_all(source)]
    assert times == [*range(20), *range(28, 50)]
    assert (source.ending.frames_read, source.ending.frames_announced, source.ending.early) == (42, 50, True)


@pytest.mark.parametrize(
    "content, message",
    [(b"", "does not open: its 0 bytes"), (b"no video at all" * 50, "does not open: its 750 bytes")],
    ids=["empty", "text"],
)
def test_a_file_that_is_no_video_is_an_error_with_its_size(tmp_path, content, message):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(str(path), clock=CLOCK).open()
    assert caught.value.hint and caught.value.exit_code == 4


def test_a_truncated_mp4_and_one_without_frames_are_errors(tmp_path):
    whole = write_video(tmp_path / "a.mp4", [picture(i) for i in range(30)], 25.0)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(SourceError, match="does not open"):
        open_source(str(cut), clock=CLOCK).open()
    nothing = tmp_path / "nothing.avi"
    cv2.VideoWriter(str(nothing), cv2.VideoWriter_fourcc(*"MJPG"), 25.0, (64, 48)).release()
    with pytest.raises(SourceError, match=r"holds no picture.*0 could be read"):
        open_source(str(nothing), clock=CLOCK).open()


@given(st.lists(st.floats(-1e4, 1e6), min_size=1, max_size=50))
def test_media_times_start_at_zero_and_never_go_back_whatever_the_timestamps_do(positions_ms):
    timeline = MediaTimeline(25.0)
    times_s = [timeline.media_time_s(position) for position in positions_ms]
    assert times_s[0] == 0.0 and all(a < b for a, b in pairwise(times_s))


def test_a_container_without_timestamps_counts_at_its_frame_rate():
    timeline = MediaTimeline(NTSC)
    times_s = [timeline.media_time_s(0.0) for _ in range(1000)]
    np.testing.assert_allclose(times_s, np.arange(1000) / NTSC, atol=1e-6)


def test_timestamps_that_name_the_next_frame_give_the_same_times():
    """Older OpenCV reports, after a read, the time of the frame that follows."""
    timeline = MediaTimeline(25.0)
    assert [timeline.media_time_s(40.0 * (i + 1)) for i in range(4)] == pytest.approx([0, 0.04, 0.08, 0.12])


def test_irregular_timestamps_are_kept():
    timeline = MediaTimeline(25.0)
    assert [timeline.media_time_s(p) for p in (500.0, 540.0, 3500.0, 3501.0)] == pytest.approx([0, 0.04, 3.0, 3.001])


def test_skipping_in_a_video_keeps_the_times_and_the_count(tmp_path):
    path = write_video(tmp_path / "a.avi", [picture(2 * i) for i in range(100)], 25.0, "MJPG")
    source = VideoFileSource(path)
    source.open()
    first = source.read()
    skipped = source.skip_to(3.0)
    frames = read_all(source)
    assert first.media_time_s == 0.0 and skipped > 40
    assert frames[0].media_time_s == pytest.approx((skipped + 1) / 25, abs=1e-3) and frames[0].media_time_s <= 3.0
    assert float(frames[0].pixels[..., 0].mean()) == pytest.approx(2 * (skipped + 1), abs=6)
    assert source.ending.frames_read == 100 and not source.ending.early


# Folders of pictures


def test_a_folder_of_pictures_is_sorted_as_people_count(tmp_path):
    for number, size in [(10, (30, 20)), (2, (40, 20)), (1, (20, 20))]:
        Image.new("RGB" if number != 2 else "L", size, 60 if number == 2 else (number, 0, 0)).save(
            tmp_path / f"f{number}.png"
        )
    (tmp_path / "notes.txt").write_text("not a picture")
    source = open_source(str(tmp_path), clock=CLOCK)
    info = source.open()
    frames = read_all(source)
    assert [f.pixels.shape[1] for f in frames] == [20, 40, 30]
    assert [f.media_time_s for f in frames] == [0.0, 1.0, 2.0]
    assert frames[1].pixels[0, 0].tolist() == [60, 60, 60] and frames[2].pixels[0, 0].tolist() == [10, 0, 0]
    assert (info.width, info.height, info.fps, info.duration_s) == (20, 20, 1.0, 3.0)
    source.open()
    assert [source.skip_to(1.9), source.read().media_time_s, source.skip_to(0.0), source.skip_to(99.0)] == [
        1,
        1.0,
        0,
        0,
    ]


def test_an_empty_folder_and_a_broken_picture_are_named(tmp_path):
    with pytest.raises(SourceError, match="holds no picture: 0 files"):
        open_source(str(tmp_path), clock=CLOCK).open()
    Image.new("RGB", (8, 8)).save(tmp_path / "a1.png")
    (tmp_path / "a2.png").write_bytes(b"\x89PNG broken")
    source = open_source(str(tmp_path), clock=CLOCK)
    source.open()
    source.read()
    with pytest.raises(SourceError, match=r"a2\.png` cannot be read"):
        source.read()


@given(st.lists(st.text(max_size=6), max_size=8))
def test_any_file_names_can_be_sorted(names):
    assert sorted(sorted(names, key=natural_key), key=natural_key) == sorted(names, key=natural_key)


# Cameras


def camera(url: str, **timeouts: float) -> CameraSource:
    return url_camera(SourceUrl(url), clock=CLOCK, **{"open_timeout_s": 3.0, "read_timeout_s": 0.5, **timeouts})


def steady(values=None):
    for value in values or count():
        yield jpeg(value % 200)
        yield wait(0.01)


def threads_named(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def test_a_camera_gives_its_newest_frame_and_counts_the_others():
    with mjpeg_server(steady) as url:
        source = camera(url)
        info = source.open()
        frames = [source.read()]
        assert (info.width, info.height, info.fps, frames[0].media_time_s) == (64, 48, None, 0.0)
        for _ in range(3):
            time.sleep(0.12)
            frames.append(source.read())
        now_ns = time.monotonic_ns()
        assert now_ns - frames[-1].captured_ns < 1e9, "an old frame was kept"
        assert source.dropped_frames >= 10
        times_s = [frame.media_time_s for frame in frames]
        arrivals_s = [(frame.captured_ns - frames[0].captured_ns) / 1e9 for frame in frames]
        assert times_s == pytest.approx(arrivals_s) and times_s == sorted(times_s)
        source.close()
        source.close()
        assert source.read() is None
    assert threads_named("camera") == 0


def test_opening_a_camera_again_and_again_leaves_nothing_behind():
    with mjpeg_server(steady) as url:
        counted = []
        for _ in range(15):
            source = camera(url)
            source.open()
            source.read()
            source.close()
            counted.append(len(os.listdir("/proc/self/fd")))
    assert threads_named("camera") == 0
    assert max(counted[5:]) - min(counted[5:]) <= 3, counted


def test_a_camera_that_stalls_is_an_error_after_the_read_timeout():
    def parts():
        yield from [jpeg(50)] * 8
        yield wait(20)

    with mjpeg_server(parts) as url:
        source = camera(url)
        source.open()
        start = time.monotonic()
        with pytest.raises(SourceError, match=r"sent no frame for 0\.5 s, after \d frames") as caught:
            read_all(source)
        assert 0.3 < time.monotonic() - start < 10
        assert "s3cret" not in str(caught.value) and "***@127.0.0.1" in str(caught.value)
        source.close()


def test_a_camera_that_never_answers_is_an_error_after_the_open_timeout():
    with mjpeg_server(steady, answers=False) as url:
        start = time.monotonic()
        with pytest.raises(SourceError, match=r"gave no picture within 0\.6 s"):
            camera(url, open_timeout_s=0.6).open()
        assert 0.5 < time.monotonic() - start < 10


def test_a_call_that_blocks_for_ever_does_not_block_us():
    """OpenCV has no timeout on some paths; whatever it does, ours fire and the thread stays behind."""
    never = threading.Event()

    class Stuck:
        def isOpened(self):
            return True

        def get(self, _):
            return 0.0

        def read(self):
            never.wait(30)
            return False, None

        def release(self):
            pass

    source = CameraSource("stuck", lambda _: Stuck(), clock=CLOCK, open_timeout_s=0.2)
    start = time.monotonic()
    with pytest.raises(SourceError, match=r"`stuck` gave no picture within 0\.2 s"):
        source.open()
    assert time.monotonic() - start < 10
    never.set()


def test_whatever_fails_in_the_reading_thread_is_one_error_and_no_traceback(capfd):
    def broken(_):
        raise RuntimeError("a bug behind rtsp://me:s3cret@h/live")

    with pytest.raises(SourceError, match=r"failed \(RuntimeError: a bug behind rtsp://\*\*\*@h/live\)"):
        CameraSource("broken", broken, clock=CLOCK).open()
    assert capfd.readouterr().err == ""


def test_a_camera_that_closes_the_connection_is_lost_and_not_ended():
    with mjpeg_server(lambda: repeat(jpeg(70), 9)) as url:
        source = camera(url)
        source.open()
        with pytest.raises(SourceError, match="closed the stream after 9 frames"):
            read_all(source)


def test_a_camera_that_sends_no_pictures_is_an_error():
    noise = np.random.default_rng(0).integers(0, 255, 3000, dtype=np.uint8).tobytes()

    def parts():
        while True:
            yield noise
            yield wait(0.02)

    with mjpeg_server(parts) as url, pytest.raises(SourceError, match=r"gave no picture within 1\.0 s|closed|open"):
        camera(url, open_timeout_s=1.0).open()


def test_broken_pictures_midway_are_skipped():
    def parts():
        for value in range(200):
            yield jpeg(100) if value % 3 else b"\xff\xd8 not a picture"
            yield wait(0.01)

    with mjpeg_server(parts) as url:
        source = camera(url, read_timeout_s=2.0)
        source.open()
        assert all(abs(float(source.read().pixels.mean()) - 100) < 3 for _ in range(20))
        source.close()


def test_a_camera_may_change_its_size():
    def parts():
        yield from [jpeg(50)] * 5
        yield wait(0.3)
        yield from steady_large()

    def steady_large():
        while True:
            yield jpeg(150, 30, 90)
            yield wait(0.02)

    with mjpeg_server(parts) as url:
        source = camera(url, read_timeout_s=2.0)
        source.open()
        means = {round(float(source.read().pixels.mean()), -1) for _ in range(30)}
        source.close()
    assert means == {50, 150}


@pytest.mark.parametrize("status", [401, 404])
def test_a_refused_request_is_an_error_without_the_password(status, capfd):
    with mjpeg_server(steady, status=status) as url, pytest.raises(SourceError, match="does not open") as caught:
        camera(url).open()
    assert "s3cret" not in f"{caught.value} {caught.value.hint} {caught.value!r}"
    shown = capfd.readouterr()
    assert "s3cret" not in shown.out + shown.err


def test_a_closed_port_is_an_error_at_once():
    start = time.monotonic()
    with pytest.raises(SourceError, match=r"rtsp://\*\*\*@127\.0\.0\.1:9/live` does not open"):
        camera("rtsp://viewer:s3cret@127.0.0.1:9/live").open()
    assert time.monotonic() - start < 10


def test_a_recording_on_a_web_server_is_not_taken_for_a_camera(tmp_path):
    write_video(tmp_path / "a.mp4", [picture(4 * i) for i in range(50)], 25.0)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    with pytest.raises(SourceError, match="is a recording of 50 frames") as caught:
        camera(f"http://viewer:s3cret@127.0.0.1:{server.server_port}/a.mp4?token=abc").open()
    assert "Download" in caught.value.hint and "abc" not in str(caught.value)
    server.shutdown()
    server.server_close()


# Names of sources


@pytest.mark.parametrize(
    "text, kind, message, hint",
    [
        ("", UsageError, "empty", "video file"),
        ("rstp://10.0.0.7/live", UsageError, "unknown scheme `rstp://`", "`rtsp://`"),
        ("ftp://host/a.mp4", UsageError, "unknown scheme `ftp://`", "http"),
        ("syntetic:table", UsageError, "unknown kind `syntetic:`", "`synthetic:`"),
        ("gts:videotestsrc", UsageError, "unknown kind `gts:`", "`gst:`"),
        ("0", UsageError, "no file", "/dev/video0"),
        ("v4l2:one", UsageError, "camera's number", "v4l2:0"),
        ("csi:", UsageError, "camera's number", "csi:0"),
        ("gst:", UsageError, "lacks its pipeline", "gst:videotestsrc"),
        ("synthetic:table", UsageError, "not available here", "streamo-edge"),
        pytest.param("a\0b", (UsageError, SourceError), "Source|Video", "", id="nul"),
        ("x" * 5000, UsageError, "no path", "video file"),
        ("/dev/video97", SourceError, "does not exist; found", "source"),
        ("v4l2:97", SourceError, "/dev/video97", "source"),
        ("nowhere/a.mp4", SourceError, "does not exist", "video file"),
    ],
)
def test_a_source_that_is_misspelt_or_missing_is_named_with_a_hint(text, kind, message, hint):
    with pytest.raises(kind, match=message) as caught:
        open_source(text, clock=CLOCK)
    assert hint in (caught.value.hint or "")


def test_only_devices_are_taken_for_cameras(tmp_path):
    shared = f"/dev/shm/streamo-{os.getpid()}.avi"
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("needs /dev/shm")
    try:
        write_video(shared, [picture(50)] * 5, 25.0, "MJPG")
        assert isinstance(open_source(shared, clock=CLOCK), VideoFileSource)
    finally:
        os.unlink(shared)
    with pytest.raises(SourceError, match="Video `/dev/nothing` does not exist"):
        open_source("/dev/nothing", clock=CLOCK)
    assert open_source("/dev/null", clock=CLOCK).live


def test_a_pipe_is_no_video(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UsageError, match="neither a file nor a camera"):
        open_source(str(tmp_path / "a.mp4"), clock=CLOCK)


def test_a_missing_video_is_answered_with_the_nearest_name(tmp_path):
    (tmp_path / "kitchen.mp4").write_bytes(b"")
    with pytest.raises(SourceError) as caught:
        open_source(str(tmp_path / "kitchn.mp4"), clock=CLOCK)
    assert str(tmp_path / "kitchen.mp4") in caught.value.hint


def test_a_pipeline_needs_an_opencv_that_can_play_it():
    if "GStreamer:                   YES" in cv2.getBuildInformation():
        pytest.skip("this OpenCV has GStreamer")
    for text in ("gst:rtspsrc location=rtsp://me:s3cret@h/x user-pw=s3cret ! fakesink", "csi:0"):
        with pytest.raises(SourceError, match="needs an OpenCV with GStreamer") as caught:
            open_source(text, clock=CLOCK)
        assert "s3cret" not in str(caught.value)


def test_a_scene_and_its_options_reach_the_factory():
    made = []
    open_source("synthetic:table?seed=7&seconds=60", clock=CLOCK, synthetic=lambda *a: made.append(a))
    open_source("synthetic:table", clock=CLOCK, synthetic=lambda *a: made.append(a))
    assert made == [("table", {"seed": "7", "seconds": "60"}), ("table", {})]
    with pytest.raises(UsageError, match="not `name=value` pairs"):
        open_source("synthetic:table?seed", clock=CLOCK, synthetic=lambda *a: made.append(a))


passwords = st.text(
    st.characters(codec="ascii", categories=["L", "N", "P", "S"], exclude_characters="\"'`"), min_size=6
)


@given(passwords)
def test_a_password_shows_in_no_text_of_an_address(password):
    url = SourceUrl(f"rtsp://admin:Zq{password}Zq@10.0.0.7:554/live")
    assert f"Zq{password}" not in f"{url} {url!r} {mask_secrets('cannot open ' + url.reveal())}"
    assert str(url).startswith("rtsp://") and str(url).endswith("10.0.0.7:554/live")


@pytest.mark.parametrize(
    "text, masked",
    [
        ("http://10.0.0.7/v?user=a&password=b", "http://10.0.0.7/v?***"),
        (
            "rtsp://10.0.0.7/user=admin_password=abc_channel=1.sdp",
            "rtsp://10.0.0.7/user=admin_password=***_channel=1.sdp",
        ),
        ("rtsp://10.0.0.7/live", "rtsp://10.0.0.7/live"),
        ("rtspsrc location=rtsp://a:b@h/x user-pw=abc ! x", "rtspsrc location=rtsp://***@h/x user-pw=*** ! x"),
    ],
)
def test_addresses_are_masked_where_they_hold_secrets(text, masked):
    assert mask_secrets(text) == masked
