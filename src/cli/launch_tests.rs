//! Which processes are launchers, as a table.

use super::*;
use clap::Parser;

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    launch: LaunchArguments,
}

fn flags(text: &str) -> LaunchArguments {
    Flags::try_parse_from(std::iter::once("x").chain(text.split_whitespace()))
        .unwrap_or_else(|e| panic!("{text}: {e}"))
        .launch
}

fn role_of(options: &str, variables: &str) -> Result<Role, String> {
    let environment: Environment = variables.split_whitespace().filter_map(|v| v.split_once('=')).collect();
    role(&flags(options), &detect(&environment).unwrap())
}

const OWN: &str =
    "DDPM_DIST_RUN_ID=a RANK=2 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=4 MASTER_ADDR=h MASTER_PORT=4000";
const TORCHRUN: &str =
    "TORCHELASTIC_RUN_ID=a RANK=2 WORLD_SIZE=4 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=4000";
const SRUN_PTY: &str = "SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1 SLURM_LOCALID=0 SLURM_STEP_TASKS_PER_NODE=1 \
                        SLURM_STEP_NODELIST=n";
const POD: &str = "PET_NNODES=4 PET_NODE_RANK=2 PET_NPROC_PER_NODE=8 PET_MASTER_ADDR=run-0 PET_MASTER_PORT=29500";

#[test]
fn who_is_a_launcher() {
    let launcher = |ranks, node, nodes, meet: &str| Role::Launcher {
        ranks,
        node,
        nodes,
        meet: meet.rsplit_once(':').map(|(host, port)| (host.to_string(), port.parse().unwrap())),
    };
    for (options, variables, expected) in [
        ("", "", Role::Worker),
        ("--ranks 4", "", launcher(4, 0, 1, "")),
        ("--gpus 8", "", launcher(8, 0, 1, "")),
        ("--ranks 2 --nnodes 3 --node-rank 2 --rdzv h:5", "", launcher(2, 2, 3, "h:5")),
        ("--ranks 2 --nnodes 2 --node-rank 0 --rdzv [fd00::1]:5", "", launcher(2, 0, 2, "fd00::1:5")),
        // Ranks have the options of their launcher, which are not for them.
        ("--ranks 4 --max-restarts 3", OWN, Role::Worker),
        ("--ranks 16", OWN, Role::Worker),
        ("", OWN, Role::Worker),
        ("", TORCHRUN, Role::Worker),
        ("--ranks 4", TORCHRUN, Role::Worker),
        ("--ranks 2", TORCHRUN, Role::Worker),
        ("--ranks 8 --nnodes 2 --node-rank 1 --rdzv h:5", TORCHRUN, launcher(8, 1, 2, "h:5")),
        ("--ranks 4", SRUN_PTY, launcher(4, 0, 1, "")),
        ("", SRUN_PTY, Role::Worker),
        ("", POD, launcher(8, 2, 4, "run-0:29500")),
        ("--ranks 3 --rdzv other:1", POD, launcher(3, 2, 4, "other:1")),
    ] {
        assert_eq!(role_of(options, variables), Ok(expected), "{options} in {variables}");
    }
}

#[test]
fn options_that_contradict_are_refused_by_name() {
    let auto = POD.replace("=8", "=auto");
    for (options, variables, words) in [
        ("--ranks 2 --gpus 2", "", &["exclude"][..]),
        ("--log-dir x", "", &["--log-dir needs --ranks"]),
        ("--ranks 2 --nnodes 2 --rdzv h:5", "", &["--nnodes 2 needs --node-rank"]),
        ("--ranks 2 --nnodes 2 --node-rank 1", "", &["--nnodes 2 needs --rdzv"]),
        ("--ranks 2 --nnodes 2 --node-rank 2 --rdzv h:5", "", &["--node-rank 2", "below 2"]),
        ("--ranks 2 --node-rank 1", "", &["--node-rank 1", "below 1"]),
        ("--ranks 8", TORCHRUN, &["rank 2 of 4", "torchrun", "--ranks 8"]),
        ("--max-restarts 2", TORCHRUN, &["--max-restarts", "torchrun"]),
        ("--ranks 4 --grace 9", TORCHRUN, &["--grace", "torchrun"]),
        ("", &auto, &["PET_NPROC_PER_NODE", "--ranks"]),
    ] {
        let error = role_of(options, variables).unwrap_err();
        assert!(words.iter().all(|word| error.contains(word)), "{options} in {variables}: {error}");
    }
    for place in ["h", "h:", ":5", "h:0", "h:70000", "fd00::1:5", "[]x:5"] {
        assert!(meeting_place(place).is_err(), "{place}");
    }
}

#[test]
fn every_exit_code_has_a_meaning_to_the_launcher() {
    use crate::cluster::launcher::Meaning;
    for (code, expected) in [(0, Meaning::Done), (6, Meaning::PeerLost), (75, Meaning::Left)] {
        assert_eq!(exit::meaning(code), expected);
    }
    for code in [2, 3, 4, 5] {
        assert!(matches!(exit::meaning(code), Meaning::Final(_)), "{code} would come again");
    }
    for code in [1, 7, 8, 101, 130, 143, 77] {
        assert!(matches!(exit::meaning(code), Meaning::Failed(_)), "{code} may not come again");
    }
}
