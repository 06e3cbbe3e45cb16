import gzip
import http.server
import socket
import threading

import numpy as np
import pytest

from normdrop.data import fashion_mnist, load
from normdrop.errors import UserError


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local stand-in for the data set's address, serving tmp_path/served; counts requests."""
    root = tmp_path / "served"
    root.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(root))

        def log_message(self, *args):
            asked.append(self.path)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        address = f"http://127.0.0.1:{running.server_address[1]}"
        monkeypatch.setattr(fashion_mnist, "BASE_ADDRESS", address)
        # A proxy from the environment must not stand between the test and its own server.
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield root, asked
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_reads_a_given_folder(tmp_path, tiny_idx, write_idx, packed):
    folder = write_idx(tmp_path / "tiny", tiny_idx, packed=packed)
    for data in (load("fashion-mnist", folder=folder), load(folder)):
        data.setup()
        assert data.name == "tiny"
        assert data.classes == tuple("0123456789")
        assert data.input_shape == (1, 28, 28)
        assert data.sizes == {"train": 30, "val": 10, "test": 20}
        first = np.frombuffer(tiny_idx["t10k-images-idx3-ubyte"], np.uint8, 784, 16)
        assert (data.pictures("test", [0])[0].ravel() == first).all()
        assert data.names("test", [3]) == ["test[3]"]


def test_fashion_test_part_is_the_official_one_for_every_seed(tmp_path, tiny_idx, write_idx):
    folder = write_idx(tmp_path / "tiny", tiny_idx)
    for seed in range(3):
        data = load(folder, seed=seed)
        data.setup()
        assert data.names("test", range(20)) == [f"test[{i}]" for i in range(20)]
        assert all(name.startswith("train") for name in data.names("val", range(10)))


def test_fashion_downloads_once_into_the_cache(tiny_is_published, tiny_idx, write_idx, server):
    root, asked = server
    write_idx(root, tiny_idx)
    data = load("fashion-mnist")
    data.setup()
    assert data.name == "fashion-mnist"
    assert data.classes[9] == "Ankle boot"
    assert len(asked) == 4
    assert len(list(tiny_is_published.iterdir())) == 4
    again = load("fashion-mnist")
    again.setup()
    assert len(asked) == 4
    assert again.digest == data.digest


def test_fashion_replaces_a_damaged_file_in_the_cache(
    tiny_is_published, tiny_idx, write_idx, server
):
    root, asked = server
    write_idx(root, tiny_idx)
    write_idx(tiny_is_published, tiny_idx)
    damaged = tiny_is_published / "train-labels-idx1-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:20])
    load("fashion-mnist").setup()
    assert len(asked) == 1
    assert gzip.decompress(damaged.read_bytes()) == tiny_idx["train-labels-idx1-ubyte"]


@pytest.mark.parametrize("damage", ["other", "cut", "page"])
def test_fashion_refuses_a_damaged_download(tiny_is_published, tiny_idx, write_idx, server, damage):
    root, _ = server
    write_idx(root, tiny_idx)
    path = root / "train-images-idx3-ubyte.gz"
    content = tiny_idx["train-images-idx3-ubyte"]
    path.write_bytes(
        {
            "other": gzip.compress(content[:-1] + bytes([content[-1] ^ 1])),
            "cut": path.read_bytes()[:-100],
            "page": b"<html>Please log in</html>",
        }[damage]
    )
    with pytest.raises(UserError, match=r"sent is not Fashion-MNIST's file.*checksum") as caught:
        load("fashion-mnist").setup()
    assert str(tiny_is_published) in str(caught.value)
    # Nothing half-done stays behind.
    assert not tiny_is_published.exists() or not list(tiny_is_published.iterdir())


def test_fashion_without_a_network_says_what_to_install_or_fill(tiny_is_published, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(fashion_mnist, "BASE_ADDRESS", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError) as caught:
        load("fashion-mnist").setup()
    text = str(caught.value)
    assert "\n" not in text
    assert "cannot be downloaded" in text
    assert "install Debian's package dataset-fashion-mnist" in text
    assert f"into {tiny_is_published}" in text


def test_fashion_of_a_server_without_the_file_is_an_error(tiny_is_published, server):
    with pytest.raises(UserError, match=r"cannot be downloaded from .*HTTP Error 404"):
        load("fashion-mnist").setup()


def test_fashion_with_a_cache_that_cannot_be_written_is_an_error(
    tiny_is_published, tiny_idx, write_idx, server
):
    write_idx(server[0], tiny_idx)
    tiny_is_published.parent.parent.mkdir(parents=True)
    tiny_is_published.parent.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written to"):
        load("fashion-mnist").setup()


def test_fashion_prefers_debians_folder(tiny_is_published, tiny_idx, write_idx, server):
    write_idx(fashion_mnist.DEBIAN_FOLDER, tiny_idx)
    load("fashion-mnist").setup()
    assert server[1] == []


def test_fashion_names_a_damaged_file_of_debians(tiny_is_published, tiny_idx, write_idx):
    tiny_idx["t10k-labels-idx1-ubyte"] += b"x"
    write_idx(fashion_mnist.DEBIAN_FOLDER, tiny_idx)
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.gz is not Fashion-MNIST's file"):
        load("fashion-mnist").setup()


def test_fashion_given_folder_must_exist_and_hold_the_files(tmp_path, tiny_idx, write_idx):
    with pytest.raises(UserError, match="there is none at"):
        load("fashion-mnist", folder=tmp_path / "nowhere").setup()
    folder = write_idx(tmp_path / "tiny", tiny_idx)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"must hold t10k-labels-idx1-ubyte.gz, but it does not"):
        load("fashion-mnist", folder=folder).setup()


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("train-images-idx3-ubyte", lambda c: c[:-5], "must be an IDX file of 3-dimensional"),
        ("train-labels-idx1-ubyte", lambda c: b"", "must be an IDX file of 1-dimensional"),
        ("t10k-labels-idx1-ubyte", lambda c: c[:7] + b"\x13" + c[8:-1], "20 and 19"),
    ],
)
def test_fashion_given_files_are_checked(tmp_path, tiny_idx, write_idx, name, change, text):
    tiny_idx[name] = change(tiny_idx[name])
    with pytest.raises(UserError, match=text):
        load(write_idx(tmp_path / "tiny", tiny_idx)).setup()


def test_fashion_given_files_that_are_no_gzip_are_an_error(tmp_path, tiny_idx, write_idx):
    folder = write_idx(tmp_path / "tiny", tiny_idx)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.gz cannot be read"):
        load(folder).setup()


@pytest.mark.skipif(
    not fashion_mnist.has_idx_files(fashion_mnist.DEBIAN_FOLDER),
    reason="Debian's package dataset-fashion-mnist is not installed",
)
def test_fashion_of_debian_is_the_published_set():
    data = load("fashion-mnist")
    data.setup()
    assert data.sizes == {"train": 54000, "val": 6000, "test": 10000}
    assert data.augmentation == ("crop", "flip")
    counts = np.bincount([int(y) for _, ys in data.val_dataloader() for y in ys])
    assert counts.tolist() == [600] * 10
    # The first test image is the ankle boot that every tutorial shows.
    _, labels = next(iter(data.test_dataloader()))
    assert data.classes[int(labels[0])] == "Ankle boot"
