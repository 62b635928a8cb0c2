import pytest

from tests.browser import chromium

pytestmark = pytest.mark.skipif(bool(chromium.missing()), reason=chromium.missing() or "-")


def test_an_error_and_a_request_are_both_seen(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><title>t</title><img src='http://127.0.0.1:9/a.png'>"
        "<script>missing()</script>"
    )
    with chromium.start(tmp_path / "profile") as driver:
        driver.get(page.as_uri())
        found = chromium.problems(driver)
        assert "http://127.0.0.1:9/a.png" in found
        assert any("missing is not defined" in line for line in found)
        assert chromium.problems(driver) == []
