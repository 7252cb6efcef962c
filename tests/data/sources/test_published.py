"""Which files a dataset is fetched as, and that a path that is given is left alone."""

import functools
import http.server
import threading
import zipfile

import pytest

from sellarec.config import Data
from sellarec.data.sources import open_source, published
from sellarec.errors import UserError


def test_a_path_that_is_given_is_left_alone(tmp_path):
    data = Data(source="movielens", dataset="ml-1m", path="somewhere")
    assert published.fetch(data, tmp_path, print) == data


def test_formats_without_published_files_are_left_to_the_path(tmp_path):
    assert published.fetch(Data(source="lcrec"), tmp_path, print).path is None


@pytest.mark.parametrize(
    ("dataset", "form", "found"),
    [
        ("2014", None, ["/reviews_A.json.gz", "/meta_A.json.gz"]),
        ("2018", "5core", ["/categoryFilesSmall/A_5.json.gz", "/metaFiles2/meta_A.json.gz"]),
        ("2023", None, ["/raw/review_categories/A.jsonl.gz", "/raw/meta_categories/meta_A.jsonl.gz"]),
    ],
)
def test_amazons_files(dataset, form, found):
    files = published.published_files(Data(source="amazon", dataset=dataset, form=form, categories=("A",)))
    assert all(url.startswith("https://") and url.endswith(end) for url, end in zip(files, found, strict=True))


def test_no_category_or_no_such_form_is_refused():
    with pytest.raises(UserError, match=r"data\.categories names no"):
        published.published_files(Data(source="amazon", dataset="2023"))
    for source in ("amazon", "movielens"):
        with pytest.raises(UserError, match=f"data.dataset is 1999, but the datasets of {source}"):
            published.published_files(Data(source=source, dataset="1999", categories=("A",)))
    with pytest.raises(UserError, match="not fetched"):
        published.published_files(Data(source="amazon", dataset="2023", form="ratings", categories=("A",)))


def test_movielens_is_fetched_and_read(tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    with zipfile.ZipFile(served / "ml-latest-small.zip", "w") as archive:
        archive.writestr("ml-latest-small/ratings.csv", "userId,movieId,rating,timestamp\n1,2,4.0,1000000000\n")
        archive.writestr("ml-latest-small/movies.csv", "movieId,title,genres\n2,Heat (1995),Action\n")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(published, "MOVIELENS", f"http://127.0.0.1:{server.server_port}")
        data = published.fetch(Data(source="movielens", dataset="ml-latest-small"), tmp_path / "here", print)
        server.shutdown()
    assert data.path == str(tmp_path / "here/ml-latest-small/ml-latest-small.zip")
    assert len(open_source(data).interactions) == 1
