"What tests that start a JupyterLab of their own share."
import socket
import time
import urllib.request

import pytest

TOKEN = 'secret'

def free_port():
    "A port of this machine at which nobody listens."
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]

def own_folders(folder):
    "Environment that keeps a JupyterLab's files in this folder."
    names = ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR')
    return {name: str(folder/name.lower()) for name in names}

def wait_for(port, server, log, seconds):
    "Until it answers; fails with the end of its log."
    ends = time.time() + seconds
    while time.time() < ends and server.poll() is None:
        try:
            urllib.request.urlopen(f'http://127.0.0.1:{port}/api?token={TOKEN}', timeout=5)
            return
        except OSError:
            time.sleep(.3)
    pytest.fail('JupyterLab did not start: ' + log.read_text()[-500:])
