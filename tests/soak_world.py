"""Does a world stay as quick and as small as it was? `python tests/soak_world.py OUT.json FRAMES`:
plays recorded keys round and round on the default engine, and writes down what it found."""

import sys
import time
from pathlib import Path

import numpy as np

from nfd_ref.speed import card, time_frame
from nfd_ref.storage import shipped, write_json
from nfd_ref.streaming import World
from nfd_ref.video import VideoFolder

EVERY = 5000        # frames for a row

def megabytes(process='self'):      # resident
    status = Path(f'/proc/{process}/status').read_text()
    line, = (line for line in status.splitlines() if line.startswith('VmRSS'))
    return int(line.split()[1]) / 1024

def main(out, frames):
    world = World.load(shipped('distilled'), device='cpu')
    videos = VideoFolder(shipped('my_way_home'), 'test')
    keys = np.concatenate([videos.clip(e).actions for e in range(len(videos))])
    keys = keys[keys[:, 0] >= 0]            # -1: nobody knows
    clip = videos.clip(0, 150, 214)
    world.reset(clip)

    rows = []
    ms = []
    started = time.time()
    for i in range(1, frames + 1):
        ms.append(time_frame(world, keys[i % len(keys)])[2])
        if i % EVERY and i < frames: continue
        rows.append(dict(
            frame=i,
            ms_median=round(float(np.median(ms)), 2),
            ms_p99=round(float(np.percentile(ms, 99)), 2),
            ms_worst=round(max(ms), 1),
            memory_mb=round(megabytes(), 1),
            seconds=round(time.time() - started)))
        print(rows[-1], flush=True)
        ms.clear()
        command = f'python tests/soak_world.py {Path(out).name} {frames}'
        about = card(world, frames, 0, 'one world, frame after frame') | dict(command=command)
        write_json(out, dict(format=1, card=about, rows=rows))

if __name__ == '__main__': main(sys.argv[1], int(sys.argv[2]))
