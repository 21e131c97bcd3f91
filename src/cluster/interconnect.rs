//! What carries sums over ranks, as two numbers for each number of ranks: bandwidth and latency. For plans; nothing here is measured on the
//! spot.
//!
//! | name | bandwidth (busbw) | where from |
//! |---|---|---|
//! | `nvlink+ib8x400` | 440, 340, 300 GB/s at 8, 64, 512 ranks | assumed: 8 GPUs a node; the 8 links of 400 Gbit/s carry 400 GB/s |
//! | `8x100gbe` | 440 in a node; 0.9 of 100 GB/s a node | assumed: a port of 12.5 GB/s for each of 8 GPUs |
//! | `100gbe` | 440 in a node; 0.9 of 12.5 GB/s a node | assumed: one port for 8 GPUs |
//! | `shm` | 2.3 GB/s | measured on two CPU ranks of one machine (docs/benchmarks.md) |
//! | `loopback` | 0.68 GB/s | the same through sockets |
//!
//! busbw is NCCL's: bytes/t·2(n−1)/n of an all-reduce that takes t, which is what a link carries in one direction. Latencies, those of
//! `shm` (100 µs) and `loopback` (200 µs) too, are assumed.

use std::str::FromStr;
use thiserror::Error;

/// GPUs of a node.
const NODE: usize = 8;
/// busbw of GPUs of one node through NVLink, bytes per second.
const NVLINK: f64 = 440e9;
/// What nodes with 8 × 400 Gbit/s reach, (ranks, bytes per second).
const INFINIBAND: [(usize, f64); 3] = [(NODE, NVLINK), (64, 340e9), (512, 300e9)];
/// Bytes per second that a port of 100 Gbit/s carries.
const PORT: f64 = 12.5e9;
/// Part of it that is payload and in time: frames, headers, and gaps between messages.
const ETHERNET: f64 = 0.9;
/// Seconds that a sum takes to begin and end in a node: launching a kernel and a round of flags. Assumed.
const IN_NODE: f64 = 10e-6;
/// Seconds more for each doubling of the number of nodes, there and back. Assumed.
const IB_HOP: f64 = 5e-6;
const ETHERNET_HOP: f64 = 25e-6;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Link {
    /// NVLink in nodes, InfiniBand between them.
    Infiniband,
    /// NVLink in nodes, so many ports of 100 Gbit/s each between them.
    Ethernet { ports: f64 },
    /// The same for any number of ranks; `host` if the cores that compute also sum.
    Flat { bandwidth: f64, latency: f64, host: bool },
}

/// A network, or the memory that ranks of one machine share.
#[derive(Clone, Debug, PartialEq)]
pub struct Interconnect {
    name: String,
    link: Link,
}

/// A network that nobody knows.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("expected one of {}, or BANDWIDTH,LATENCY of your own, for example 25GB/s,20us; found `{found}`", Interconnect::NAMES.join(", "))]
pub struct UnknownInterconnect {
    found: String,
}

impl Interconnect {
    /// The networks that have a name.
    pub const NAMES: [&'static str; 5] = ["nvlink+ib8x400", "8x100gbe", "100gbe", "shm", "loopback"];

    /// As the user says it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether CPU ranks of one machine meet there: their sums are computed by the cores that compute the gradients, so that nothing goes on
    /// beside them.
    pub fn is_host(&self) -> bool {
        matches!(self.link, Link::Flat { host: true, .. })
    }

    /// Bytes per second that the slowest link carries in one direction while `ranks` add up, beyond what is counted in 2(n−1)/n.
    ///
    /// InfiniBand: between the numbers of ranks that are known, a straight line over log2 n, which goes on beyond the last.
    /// Ethernet: all of a node's traffic, 2(m−1)/m of the bytes for m nodes, goes through its ports, so that
    /// busbw = ports·(n−1)/n ÷ (m−1)/m.
    pub fn busbw(&self, ranks: usize) -> f64 {
        let nodes = ranks.div_ceil(NODE);
        let part = |n: usize| (n as f64 - 1.0) / n as f64;
        match self.link {
            Link::Flat { bandwidth, .. } => bandwidth,
            _ if nodes <= 1 => NVLINK,
            Link::Infiniband => {
                let segment = if ranks <= INFINIBAND[1].0 { 0 } else { 1 };
                let [(n0, b0), (n1, b1)] = [INFINIBAND[segment], INFINIBAND[segment + 1]];
                let log = |n: usize| (n as f64).log2();
                let line = b0 + (b1 - b0) * (log(ranks) - log(n0)) / (log(n1) - log(n0));
                // Beyond what is known, but never nothing.
                line.max(0.5 * INFINIBAND[2].1)
            }
            Link::Ethernet { ports } => (ports * PORT * ETHERNET * part(ranks) / part(nodes)).min(NVLINK),
        }
    }

    /// α: seconds that a sum over `ranks` takes however small it is.
    pub fn latency(&self, ranks: usize) -> f64 {
        let doublings = (ranks.div_ceil(NODE).max(1) as f64).log2();
        match self.link {
            Link::Flat { latency, .. } => latency,
            Link::Infiniband => IN_NODE + IB_HOP * doublings,
            Link::Ethernet { .. } => IN_NODE + ETHERNET_HOP * doublings,
        }
    }

    /// Where the numbers come from, in a few words.
    pub fn origin(&self) -> &'static str {
        match self.link {
            Link::Infiniband => "assumed: 8 GPUs a node on NVLink, 8 × 400 Gbit/s between nodes",
            Link::Ethernet { ports: 1.0 } => "assumed: 8 GPUs a node on NVLink, one port of 100 Gbit/s a node",
            Link::Ethernet { .. } => "assumed: 8 GPUs a node on NVLink, 8 ports of 100 Gbit/s a node",
            Link::Flat { host: true, .. } => "bandwidth measured on 2 CPU ranks of one machine, latency assumed",
            Link::Flat { host: false, .. } => "as given",
        }
    }
}

impl FromStr for Interconnect {
    type Err = UnknownInterconnect;

    fn from_str(text: &str) -> Result<Interconnect, UnknownInterconnect> {
        let host = |bandwidth, latency| Link::Flat { bandwidth, latency, host: true };
        let link = match text {
            "nvlink+ib8x400" => Some(Link::Infiniband),
            "8x100gbe" => Some(Link::Ethernet { ports: 8.0 }),
            "100gbe" => Some(Link::Ethernet { ports: 1.0 }),
            "shm" => Some(host(2.3e9, 100e-6)),
            "loopback" => Some(host(0.68e9, 200e-6)),
            _ => of_numbers(text),
        };
        match link {
            Some(link) => Ok(Interconnect { name: text.to_string(), link }),
            None => Err(UnknownInterconnect { found: text.to_string() }),
        }
    }
}

/// `25GB/s,20us`.
fn of_numbers(text: &str) -> Option<Link> {
    let (bandwidth, latency) = text.split_once(',')?;
    let bandwidth = quantity(bandwidth, &[("GB/s", 1e9), ("MB/s", 1e6), ("Gbit/s", 0.125e9)]).filter(|b| *b > 0.0)?;
    let latency = quantity(latency, &[("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3)])?;
    Some(Link::Flat { bandwidth, latency, host: false })
}

/// A number that is not negative with one of these units.
fn quantity(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let text = text.trim();
    let (number, size) = units.iter().find_map(|(unit, size)| Some((text.strip_suffix(unit)?, size)))?;
    let value = number.trim().parse::<f64>().ok()? * size;
    (value.is_finite() && value >= 0.0).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Interconnect {
        text.parse().unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn bandwidth_between_what_is_known_lies_on_a_line() {
        let ib = network("nvlink+ib8x400");
        for (ranks, gigabytes) in [(2, 440.0), (8, 440.0), (64, 340.0), (512, 300.0)] {
            assert!((ib.busbw(ranks) / 1e9 - gigabytes).abs() < 1e-9, "{ranks}");
        }
        // A third and two thirds of the three doublings from 8 to 64; then 40 GB/s over three doublings, also beyond 512.
        assert!((ib.busbw(16) / 1e9 - (440.0 - 100.0 / 3.0)).abs() < 1e-9);
        assert!((ib.busbw(256) / 1e9 - (340.0 - 80.0 / 3.0)).abs() < 1e-9);
        assert!((ib.busbw(4096) / 1e9 - 260.0).abs() < 1e-9);
    }

    /// All of a node's traffic passes its port: with two nodes of 8, each sends the bytes once, which busbw counts as 15/8.
    #[test]
    fn a_port_is_shared_by_its_node() {
        let ethernet = network("100gbe");
        assert_eq!(ethernet.busbw(8), NVLINK);
        assert!((ethernet.busbw(16) - 0.9 * 12.5e9 * 15.0 / 8.0).abs() < 1.0);
        assert!((ethernet.busbw(64) - 0.9 * 12.5e9 * (63.0 / 64.0) / (7.0 / 8.0)).abs() < 1.0);
        assert!((network("8x100gbe").busbw(512) / ethernet.busbw(512) - 8.0).abs() < 1e-9);
    }

    #[test]
    fn numbers_of_ones_own() {
        for (text, bandwidth, latency) in
            [("25GB/s,20us", 25e9, 20e-6), ("100 Gbit/s, 0.5 ms", 12.5e9, 5e-4), ("800MB/s,0µs", 8e8, 0.0)]
        {
            let network = network(text);
            assert!((network.busbw(64) / bandwidth - 1.0).abs() < 1e-12, "{text}");
            assert!((network.latency(64) - latency).abs() < 1e-12 && !network.is_host(), "{text}");
        }
        for text in ["", "ib", "25GB/s", "25,20", "0GB/s,1us", "-1GB/s,1us", "1GB/s,-1us", "infGB/s,1us", "NaNGB/s,1us"]
        {
            let error = text.parse::<Interconnect>().unwrap_err().to_string();
            assert!(Interconnect::NAMES.iter().all(|name| error.contains(name)) && error.contains(text), "{error}");
        }
    }
}
