"""A headless Chromium, in which tests open pages as a reader does: from disk, without a network."""

import contextlib
import json
import shutil

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
)  # fmt: skip
INSIDE = ("file:", "data:", "blob:", "about:", "chrome:")  # what needs no network


def missing() -> str:
    """Why no page can be opened here; "" if one can."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (requirements-test.txt)"
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return ""


@contextlib.contextmanager
def start(folder):
    """A selenium WebDriver, with a profile of its own in `folder`."""
    from selenium import webdriver
    from selenium.webdriver.chrome import service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(
        options=options, service=service.Service(shutil.which("chromedriver"))
    )
    try:
        driver.get("about:blank")
        problems(driver)  # what the browser did of itself
        yield driver
    finally:
        driver.quit()


def show(driver, *, width=1200, scheme="light"):
    """Sets the width of the screen in pixels, and the colour scheme that the reader prefers."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def problems(driver) -> list[str]:
    """Errors on the console, and addresses outside that were asked for, since the last call."""
    found = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            address = message["params"]["request"]["url"]
            found += [] if address.startswith(INSIDE) else [address]
    return found
