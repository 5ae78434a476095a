"""How much of the bare engine the server keeps, how long an answer takes, and what overload does to it.

    python benchmarks/serve.py --bundle optimized_models/ --checkpoint checkpoints/best_model.pth
    python benchmarks/serve.py --checkpoint checkpoints/best_model.pth --seconds 3 --rounds 1 --overload-seconds 5 \\
        --memory-requests 500 --skip litserve                                                    # a short look

Posts JPEGs from a second process on loopback and prints, in this order:
1. throughput with 16 clients over that of the bare engine fed by the same decoder in one process (A B A B …), with the
   load generator's own share of the processor, and both as processor time a film, which other processes disturb less;
2. p99 at 70 % of that throughput over the latency of one client alone, arrivals even and Poisson;
3. the ratios to a plain FastAPI handler that runs torch per request, and to LitServe with the same engine (A B A B …);
4. three times the throughput for a minute: every request answered, accepted ones in time, recovery; the growth of
   memory over 20,000 requests.
--bundle or --checkpoint is served; the FastAPI handler always runs --checkpoint. Without either, an untrained network
(--model) stands in: its cost is that of a trained one. --json FILE keeps the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from PIL import Image

import synthetic
from benchmarks.serving_bench import ROOT, Server, untrained_checkpoint

PORT = 8471
"""Of the servers we compare with; our own takes a free one."""


def films(folder: Path, count: int, size: int) -> list[Path]:
    """JPEG films of `size` pixels a side."""
    paths = []
    for seed in range(count):
        path = folder / f"film{seed}.jpeg"
        Image.fromarray(synthetic.film(pneumonia=bool(seed % 2), seed=seed, size=size)).save(path, quality=92)
        paths.append(path)
    return paths


def load(url: str, paths: list[Path], *words: str) -> dict[str, Any]:
    """What the load generator reports."""
    command = [sys.executable, str(ROOT / "benchmarks" / "load_generator.py"), url, *map(str, paths), *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def percentile(latencies: list[float], share: float) -> float:
    """In milliseconds; NaN of none."""
    return float(np.quantile(latencies, share)) * 1000 if latencies else float("nan")


def bare(source: str, paths: list[Path], seconds: float, max_batch: int) -> tuple[float, float]:
    """Films per second of decoder and engine without a server, and processor seconds a film; needs its own process."""
    import predictor
    from inference_api import one_thread_a_core
    from preprocess import apply, decode

    one_thread_a_core(0)
    loaded = predictor.load(source)
    loaded.widen_calls(most=max_batch)
    contents = [path.read_bytes() for path in paths]

    def image(index: int) -> Any:
        return apply(loaded.spec, decode(contents[index % len(contents)], loaded.spec))

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        ahead = [pool.submit(image, index) for index in range(2 * max_batch)]
        done, count, started, cpu = 0, len(ahead), 0.0, 0.0
        while not started or time.perf_counter() - started < seconds:
            batch = [future.result() for future in ahead[:max_batch]]
            ahead = [*ahead[max_batch:], *(pool.submit(image, count + index) for index in range(max_batch))]
            count += max_batch
            loaded.exact_outputs(np.stack(batch))
            if count == 5 * max_batch:  # the first batches warm up
                started, cpu, done = time.perf_counter(), time.process_time(), -max_batch
            done += max_batch
        return done / (time.perf_counter() - started), (time.process_time() - cpu) / done


class Bench:
    """One measured model and what was found."""

    def __init__(self, arguments: argparse.Namespace, served: list[str], paths: list[Path]) -> None:
        self.arguments, self.served, self.paths = arguments, served, paths
        self.found: dict[str, Any] = {"cores": os.cpu_count(), "served": served[1]}

    def closed(self, url: str, seconds: float | None = None, clients: int = 16) -> dict[str, Any]:
        """A closed loop of `clients`, after a short one that warms up."""
        self.warm(url, clients)
        words = ["--clients", str(clients), "--seconds", str(seconds or self.arguments.seconds)]
        return load(url, self.paths, *words)

    def warm(self, url: str, clients: int = 16) -> None:
        """A second of a closed loop."""
        load(url, self.paths, "--clients", str(clients), "--seconds", "1")

    def bare_rate(self) -> tuple[float, float]:
        """`bare` in a process of its own."""
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path;"
            "from benchmarks.serve import bare;"
            f"print(*bare({self.served[1]!r}, [Path(p) for p in {[str(p) for p in self.paths]!r}],"
            f" {self.arguments.seconds}, {self.arguments.max_batch}))"
        )
        ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        rate, cpu_s = map(float, ended.stdout.split()[-2:])
        return rate, cpu_s

    def server(self) -> Server:
        """Ours."""
        return Server([*self.served, "--set", f"serving.max_batch={self.arguments.max_batch}"])

    def throughput(self) -> float:
        """Part 1; the median of the server's films per second."""
        pairs, shares, server_shares, cpu_pairs = [], [], [], []
        for _ in range(self.arguments.rounds):
            alone, alone_cpu_s = self.bare_rate()
            with self.server() as server:
                self.warm(server.url)
                before = server.cpu_s()
                report = load(server.url, self.paths, "--clients", "16", "--seconds", str(self.arguments.seconds))
                server_cpu_s = server.cpu_s() - before
            server_shares.append(server_cpu_s / report["seconds"])
            cpu_pairs.append((alone_cpu_s, server_cpu_s / sum(report["statuses"].values())))
            shares.append(report["cpu_s"] / report["seconds"])
            pairs.append((alone, report["films_per_s"]))
        ratio = statistics.median(served / alone for alone, served in pairs)
        rate = statistics.median(served for _, served in pairs)
        self.found["throughput"] = {
            "bare_films_per_s": statistics.median(alone for alone, _ in pairs),
            "served_films_per_s": rate,
            "ratio": ratio,
            "generator_cores": statistics.median(shares),
            "server_cores": statistics.median(server_shares),
            "pairs": pairs,
            "cpu_s_a_film": cpu_pairs,
        }
        bare_ms, served_ms = (1000 * statistics.median(values) for values in zip(*cpu_pairs))
        print(
            f"16 clients: {rate:.1f} films/s of {self.found['throughput']['bare_films_per_s']:.1f} bare = {ratio:.1%} "
            f"(of {len(pairs)} pairs: {', '.join(f'{b / a:.1%}' for a, b in pairs)}); of {os.cpu_count()} "
            f"cores the generator used {statistics.median(shares):.3f}, "
            f"the server {statistics.median(server_shares):.2f}; processor time a film: {served_ms:.2f} ms, bare "
            f"{bare_ms:.2f} = {bare_ms / served_ms:.1%}"
        )
        return rate

    def latency(self, rate: float) -> None:
        """Part 2."""
        seconds = str(2 * self.arguments.seconds)
        with self.server() as server:
            one = percentile(self.closed(server.url, clients=1)["latencies"], 0.5)
            self.found["latency"] = {"one_client_ms": one}
            for arrivals in ("even", "poisson"):
                words = [
                    "--rate",
                    str(0.7 * rate),
                    "--arrivals",
                    arrivals,
                    "--seconds",
                    seconds,
                ]
                report = load(server.url, self.paths, *words)
                p50, p99 = (percentile(report["latencies"], share) for share in (0.5, 0.99))
                self.found["latency"][arrivals] = {"p50_ms": p50, "p99_ms": p99, "ratio": p99 / one}
                print(
                    f"at 70 % load, {arrivals} arrivals: p50 {p50:.1f} ms, p99 {p99:.1f} ms = {p99 / one:.2f} x "
                    f"{one:.1f} ms of one client alone"
                )

    def against(self, kind: str, source: list[str]) -> None:
        """Part 3: our films per second over those of another server."""
        script = [str(ROOT / "benchmarks" / "other_servers.py"), kind, "--port", str(PORT)]
        pairs = []
        for _ in range(self.arguments.rounds):
            with self.server() as server:
                ours = self.closed(server.url)["films_per_s"]
            with Server(source, script=script, ready="/health") as other:
                pairs.append((ours, self.closed(other.url)["films_per_s"]))
        ratio = statistics.median(ours / other for ours, other in pairs)
        self.found[kind] = {"ratio": ratio, "pairs": pairs}
        shown = ", ".join(f"{ours:.1f}/{other:.1f}" for ours, other in pairs)
        print(f"against {kind}: {ratio:.2f} x (films/s {shown})")

    def overload(self, rate: float) -> None:
        """Part 4, the first half."""
        seconds = self.arguments.overload_seconds
        with self.server() as server:
            calm = percentile(self.closed(server.url)["latencies"], 0.99)
            report = load(server.url, self.paths, "--rate", str(3 * rate), "--seconds", str(seconds))
            after = load(server.url, self.paths, "--clients", "1", "--seconds", "1")
            first = after["latencies"][0] * 1000
            p99 = percentile(report["latencies"], 0.99)
            self.found["overload"] = {
                "statuses": report["statuses"],
                "lost": report["lost"],
                "p99_ms": p99,
                "p99_16_clients_ms": calm,
                "films_per_s": report["films_per_s"],
                "first_answer_after_ms": first,
            }
            print(
                f"3 x overload for {seconds:g} s: answers {report['statuses']}, lost {report['lost']}, accepted "
                f"{report['films_per_s']:.1f} films/s at p99 {p99:.0f} ms (16 clients: {calm:.0f} ms); "
                f"first answer afterwards {first:.0f} ms"
            )

    def memory(self) -> None:
        """Part 4, the second half."""
        count = self.arguments.memory_requests
        with self.server() as server:
            rate = self.closed(server.url, seconds=max(3.0, self.arguments.seconds))["films_per_s"]
            before, sent, peak = server.memory_mb(), 0, 0.0
            while sent < count:
                report = load(server.url, self.paths, "--seconds", str(min(60.0, (count - sent) / rate + 1)))
                sent += sum(report["statuses"].values())
                peak = max(peak, server.memory_mb())
            growth = server.memory_mb() / before - 1
            self.found["memory"] = {"requests": sent, "before_mb": before, "growth": growth, "peak_mb": peak}
            print(f"memory {before:.0f} MiB, after {sent} requests {growth:+.1%} (peak {peak:.0f} MiB)")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint")
    parser.add_argument("--bundle")
    parser.add_argument("--model", default="resnet50", help="without --checkpoint: an untrained one (resnet50)")
    parser.add_argument("--image-size", type=int, default=224, help="of the untrained one (224)")
    parser.add_argument("--films", type=int, default=32, help="different JPEGs posted (32)")
    parser.add_argument("--film-size", type=int, default=224, help="their side, in pixels (224)")
    parser.add_argument("--seconds", type=float, default=15, help="of each timed run (15)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of each comparison (3)")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--overload-seconds", type=float, default=60)
    parser.add_argument("--memory-requests", type=int, default=20_000)
    parts = ("throughput", "latency", "fastapi", "litserve", "overload", "memory")
    parser.add_argument("--skip", nargs="+", choices=parts, default=[])
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = arguments.checkpoint or str(
            untrained_checkpoint(folder, model=arguments.model, image_size=arguments.image_size)
        )
        served = ["--bundle", arguments.bundle] if arguments.bundle else ["--checkpoint", checkpoint]
        bench = Bench(arguments, served, films(folder, arguments.films, arguments.film_size))
        if "throughput" in arguments.skip:
            with bench.server() as server:
                rate = bench.closed(server.url)["films_per_s"]
        else:
            rate = bench.throughput()
        parts = {
            "latency": lambda: bench.latency(rate),
            "fastapi": lambda: bench.against("fastapi", ["--checkpoint", checkpoint]),
            "litserve": lambda: bench.against("litserve", served),
            "overload": lambda: bench.overload(rate),
            "memory": bench.memory,
        }
        for part, measure in parts.items():
            if part not in arguments.skip:
                measure()
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(bench.found, indent=2) + "\n")


if __name__ == "__main__":
    main()
