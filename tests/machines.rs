//! Two machines, each with a name, an `/etc/hosts` and a network of its own, and a cable between them: namespaces of this machine, which end
//! with the processes in them.

mod common;

use common::{Project, Running, not_tested};
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The names of the machines and their addresses. As Debian sets a machine up, its own name means loopback to itself.
const HOSTS: [&str; 2] = [
    "127.0.0.1 localhost\n127.0.1.1 node0\n10.77.0.2 node1\n",
    "127.0.0.1 localhost\n10.77.0.1 node0\n127.0.1.1 node1\n",
];

/// A machine, which lasts as long as the process that keeps its namespaces.
struct Machine {
    keeper: Child,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

impl Machine {
    /// Machine `number`, without a cable; nothing where the system does not allow it.
    fn new(project: &Project, number: usize) -> Option<Machine> {
        let hosts = project.write(format!("hosts-{number}").as_str(), HOSTS[number]);
        let script = format!(
            "mount --bind {} /etc/hosts && ip link set lo up && hostname node{number} && echo ready && exec sleep 600",
            hosts.display()
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "--net", "--uts", "sh", "-c", &script]).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut machine = Machine { keeper: command.spawn().ok()? };
        let mut said = [0; 5];
        machine.keeper.stdout.as_mut()?.read_exact(&mut said).ok()?;
        (said == *b"ready").then_some(machine)
    }

    /// Two of them and their cable.
    fn two(project: &Project) -> Option<[Machine; 2]> {
        let machines = [Machine::new(project, 0)?, Machine::new(project, 1)?];
        let other = machines[1].keeper.id().to_string();
        let is_laid = machines[0].ip(&format!("link add cable type veth peer name cable netns {other}"))
            && machines[0].ip("addr add 10.77.0.1/24 dev cable")
            && machines[1].ip("addr add 10.77.0.2/24 dev cable")
            && machines.iter().all(|machine| machine.ip("link set cable up"));
        is_laid.then_some(machines)
    }

    /// Two machines, or word that there are none.
    fn two_or_say_so(project: &Project) -> Option<[Machine; 2]> {
        let machines = Machine::two(project);
        if machines.is_none() {
            not_tested("no network namespaces here: they take root, unshare, nsenter and ip");
        }
        machines
    }

    fn ip(&self, words: &str) -> bool {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.keeper.id().to_string(), "--net", "ip"]).args(words.split(' '));
        command.status().is_ok_and(|status| status.success())
    }

    /// The program on this machine.
    fn program(&self, project: &Project) -> Command {
        let mut command = project.program_by("nsenter");
        command.args(["--target", &self.keeper.id().to_string(), "--mount", "--net", "--uts"]);
        command.arg(format!("--wdns={}", project.path("").display())).arg(env!("CARGO_BIN_EXE_ddpm-dist"));
        command
    }
}

/// A launcher on each machine, with two ranks.
fn launch(project: &Project, machines: &[Machine; 2], options: &[&str], train: &[&str]) -> [Running; 2] {
    std::array::from_fn(|node| {
        let mut command = machines[node].program(project);
        command.args(["--ranks", "2", "--nnodes", "2", "--node-rank", &node.to_string(), "--rdzv", "node0:29500"]);
        command.args(options).args(["train", "config.toml", "--run-dir", "run", "--threads", "1"]);
        command.args(["--set", "train.shards=4"]).args(train);
        project.start(&format!("node-{node}"), command)
    })
}

#[test]
fn two_machines_train_as_one_does() {
    let project = Project::new();
    let Some(machines) = Machine::two_or_say_so(&project) else { return };
    let steps = ["--set", "train.steps=30"];
    project.trained("straight", &[&steps[..], &["--set", "train.shards=4"]].concat());
    for running in launch(&project, &machines, &[], &steps) {
        let (code, stderr) = running.wait();
        assert_eq!(code, Some(0), "{stderr}");
    }
    assert_eq!(project.measured("run"), project.measured("straight"));
    assert_eq!(project.hashes("run", 30).len(), 4);
}

/// As a batch system starts them, without a launcher of ours.
#[test]
fn ranks_on_two_machines_find_each_other_by_name() {
    let project = Project::new();
    let Some(machines) = Machine::two_or_say_so(&project) else { return };
    project.trained("straight", &["--set", "train.steps=30", "--set", "train.shards=4"]);
    let ranks: Vec<Running> = (0..4)
        .map(|rank| {
            let mut command = machines[rank / 2].program(&project);
            command.args(["train", "config.toml", "--run-dir", "run", "--threads", "1"]);
            command.args(["--set", "train.steps=30", "--set", "train.shards=4"]);
            let variables = [("RANK", rank), ("WORLD_SIZE", 4), ("LOCAL_RANK", rank % 2), ("LOCAL_WORLD_SIZE", 2)];
            command.envs(variables.map(|(name, value)| (name, value.to_string())));
            command.env("MASTER_ADDR", "node0").env("MASTER_PORT", "29501");
            project.start(&format!("rank-{rank}"), command)
        })
        .collect();
    for running in ranks {
        let (code, stderr) = running.wait();
        assert_eq!(code, Some(0), "{stderr}");
    }
    assert_eq!(project.measured("run"), project.measured("straight"));
}

#[test]
fn a_cable_that_is_pulled_ends_the_attempt_on_both_sides() {
    let project = Project::new();
    let Some(machines) = Machine::two_or_say_so(&project) else { return };
    let options = ["--max-restarts", "1", "--min-ranks", "2"];
    let train = ["--set", "train.steps=2000", "--set", "cluster.timeout=5"];
    let [mut lead, other] = launch(&project, &machines, &options, &train);
    lead.until("steps", || project.path("run/log.jsonl").exists() && project.log_lines("run") >= 20);
    let since = Instant::now();
    assert!(machines[1].ip("link set cable down"));
    let (code, stderr) = other.wait();
    assert_eq!(code, Some(6), "{stderr}");
    assert!(since.elapsed() < Duration::from_secs(60), "the machine that is cut off leaves");
    // The other goes on alone, from the last checkpoint.
    let (code, stderr) = lead.wait();
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("node 1 (node1") && stderr.contains("with 2 ranks in place of 4"), "{stderr}");
    project.hashes("run", 2000);
}
