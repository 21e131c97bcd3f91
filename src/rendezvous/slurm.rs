//! Two notations of Slurm.

/// The first host of a list such as `gpu[03-05,9],login1`.
pub(super) fn first_host(list: &str) -> Option<String> {
    let mut host = String::new();
    let mut rest = list.trim();
    loop {
        let Some(at) = rest.find(['[', ',']) else {
            host.push_str(rest);
            break;
        };
        host.push_str(&rest[..at]);
        if rest[at..].starts_with(',') {
            break;
        }
        let close = rest[at..].find(']')?;
        let numbers = &rest[at + 1..at + close];
        host.push_str(numbers.split([',', '-']).next()?);
        rest = &rest[at + close + 1..];
    }
    (!host.is_empty()).then_some(host)
}

/// How many tasks node `node` has, by a list such as `2(x3),1`: two on each of three nodes, then one.
pub(super) fn tasks_of_node(list: &str, node: usize) -> Option<usize> {
    let mut first = 0usize;
    for entry in list.trim().split(',') {
        let (tasks, nodes) = match entry.split_once("(x") {
            Some((tasks, nodes)) => (tasks, nodes.strip_suffix(')')?.parse().ok()?),
            None => (entry, 1),
        };
        first = first.checked_add(nodes)?;
        if node < first {
            return tasks.parse().ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_host_of_a_list() {
        for (list, first) in [
            ("vm", "vm"),
            ("node1,node2", "node1"),
            ("gpu[03-05,9],login1", "gpu03"),
            ("n[7]", "n7"),
            ("rack[2-3]n[01-16]", "rack2n01"),
            ("a[1,3]-ib,b", "a1-ib"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(first), "{list}");
        }
        for list in ["", "n[1-3", ","] {
            assert_eq!(first_host(list), None, "{list}");
        }
    }

    #[test]
    fn tasks_of_each_node() {
        let tasks: Vec<Option<usize>> = (0..6).map(|node| tasks_of_node("2(x3),1,4", node)).collect();
        assert_eq!(tasks, [Some(2), Some(2), Some(2), Some(1), Some(4), None]);
        for list in ["", "two", "2(x", "2(x3", "2(xx)"] {
            assert_eq!(tasks_of_node(list, 0), None, "{list}");
        }
        assert_eq!(tasks_of_node("1(x18446744073709551615),1", 0), Some(1));
    }
}
