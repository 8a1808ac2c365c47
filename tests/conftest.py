"Tests run on the CPU with two threads, as the README promises."
import os
os.environ.setdefault('OMP_NUM_THREADS', '2')
