//! How the cores of a machine are divided among its ranks: a launcher may have bound each of them to its own, or none.

use crate::machine::host_name;
use rustix::thread::{CpuSet, sched_getaffinity};
use serde::{Deserialize, Serialize};
use std::io;

/// What a rank may compute on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cores {
    /// Its machine.
    host: String,
    /// Their numbers there.
    numbers: Vec<usize>,
}

impl Cores {
    /// Those of this process, by its affinity mask.
    ///
    /// # Errors
    /// A system that does not tell.
    pub fn of_this_process() -> io::Result<Cores> {
        let mask = sched_getaffinity(None)?;
        Ok(Cores { host: host_name(), numbers: (0..CpuSet::MAX_CPU).filter(|&core| mask.is_set(core)).collect() })
    }

    /// This rank's part of its own cores, from 0 to 1: each core is divided among those of `ranks` (with this one) that may compute on it.
    pub fn part(&self, ranks: &[Cores]) -> f64 {
        let here: Vec<&Cores> = ranks.iter().filter(|other| other.host == self.host).collect();
        let users = |core| here.iter().filter(|other| other.numbers.contains(core)).count().max(1);
        self.numbers.iter().map(|core| 1.0 / users(core) as f64).sum::<f64>() / self.numbers.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_is_divided_among_those_who_may_use_it() {
        let cores =
            |host: &str, numbers: std::ops::Range<usize>| Cores { host: host.into(), numbers: numbers.collect() };
        for (name, ranks, expected) in [
            ("alone", vec![cores("a", 0..8)], vec![1.0]),
            ("unbound", vec![cores("a", 0..8); 4], vec![0.25; 4]),
            ("each its own", vec![cores("a", 0..4), cores("a", 4..8)], vec![1.0; 2]),
            ("two to a socket", [vec![cores("a", 0..4); 2], vec![cores("a", 4..8); 2]].concat(), vec![0.5; 4]),
            ("two machines", vec![cores("a", 0..8), cores("b", 0..8)], vec![1.0; 2]),
            ("in part", vec![cores("a", 0..4), cores("a", 2..4)], vec![0.75, 0.5]),
            ("none known", vec![cores("a", 0..0)], vec![0.0]),
        ] {
            let found: Vec<f64> = ranks.iter().map(|rank| rank.part(&ranks)).collect();
            assert_eq!(found, expected, "{name}");
        }
        let here = Cores::of_this_process().unwrap();
        let text = serde_json::to_string(&here).unwrap();
        assert_eq!(serde_json::from_str::<Cores>(&text).unwrap(), here);
        assert!(!here.numbers.is_empty() && here.part(std::slice::from_ref(&here)) == 1.0);
    }
}
