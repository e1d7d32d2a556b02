"""A browser without a window, spoken to through two pipes by the Chrome DevTools Protocol."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path


def find():
    """Chromium's path; None where there is none."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


class Page:
    """One open file, with everything that it asked for, said, and got wrong."""

    def __init__(self, path: Path, folder: Path, width: int = 1200):
        to_browser, self._in = os.pipe()
        self._out, from_browser = os.pipe()
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
        ]
        options += ["--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
        command = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", find(), *options, "about:blank"],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session = b"", 0, None
        self.requests, self.said, self._loaded = [], [], False
        target = next(one for one in self._send("Target.getTargets")["targetInfos"] if one["type"] == "page")
        attached = self._send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")
        self._send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self._send("Page.navigate", url=path.as_uri())
        end = time.monotonic() + 60
        while not self._loaded and time.monotonic() < end:
            self._receive()

    def run(self, script):
        """The value of a JavaScript expression."""
        result = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def dark(self, on):
        """Prefers dark colours, or light ones."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])

    def prints(self, width):
        """As on a sheet of that many pixels."""
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
        self._send("Emulation.setEmulatedMedia", media="print")
        self.run("dispatchEvent(new Event('beforeprint'))")

    def picture(self):
        """The page as PNG."""
        return self._send("Page.captureScreenshot", captureBeyondViewport=True)["data"]

    def close(self):
        os.close(self._in)
        self._process.terminate()
        self._process.wait(20)
        os.close(self._out)

    def _send(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._in, json.dumps(message).encode() + b"\0")
        number = self._number
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self):
        while b"\0" not in self._buffer:
            part = os.read(self._out, 2**16)
            assert part, "the browser is gone"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(parameters)
        return message
