//! Detection on recorded environments, and on what several machines and faulty set-ups look like.

use crate::rendezvous::*;

/// A file of `tests/launchers/`.
fn recorded(name: &str) -> Environment {
    let path = format!("{}/tests/launchers/{name}.env", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let environment: Environment = text.lines().map(|line| line.split_once('=').unwrap()).collect();
    // MPICH's ranks share the process that started them, and nothing else.
    if name == "mpich" { environment.started_by(4145) } else { environment }
}

fn environment(variables: &str) -> Environment {
    variables.split_whitespace().map(|variable| variable.split_once('=').unwrap()).collect()
}

fn world(environment: &Environment) -> World {
    match detect(environment) {
        Ok(Detected::Rank(world)) => world,
        other => panic!("{other:?}"),
    }
}

/// Launcher, rank, size, local rank, local size.
fn place(environment: &Environment) -> (Launcher, [usize; 4]) {
    let World { launcher, rank, size, local_rank, local_size, .. } = world(environment);
    (launcher, [rank, size, local_rank, local_size])
}

#[test]
fn real_launchers_on_one_machine() {
    for (name, launcher) in [
        ("torchrun", Launcher::Torchrun),
        ("openmpi", Launcher::OpenMpi),
        ("mpich", Launcher::Pmi),
        ("slurm", Launcher::Slurm),
        ("slurm-pmi2", Launcher::Slurm),
        ("sbatch-openmpi", Launcher::OpenMpi),
        ("sbatch-mpich", Launcher::Pmi),
    ] {
        assert_eq!(place(&recorded(name)), (launcher, [1, 2, 1, 2]), "{name}");
    }
    assert_eq!(detect(&recorded("sbatch")), Ok(Detected::Alone), "a batch script is one process");
    assert_eq!(detect(&Environment::default()), Ok(Detected::Alone));
}

#[test]
fn where_the_ranks_of_real_launchers_meet() {
    let torchrun = world(&recorded("torchrun"));
    let expected = StoreAddress { host: "localhost".into(), port: 44093, served_by: StoreHost::Launcher };
    assert_eq!((torchrun.store, torchrun.attempt), (expected, 0));
    assert_eq!(world(&recorded("slurm")).store.host, "vm");
    for name in ["openmpi", "mpich", "slurm", "sbatch-openmpi", "sbatch-mpich"] {
        let store = world(&recorded(name)).store;
        assert!(store.served_by == StoreHost::RankZero && (15_000..30_000).contains(&store.port), "{name}: {store:?}");
    }
    // Two jobs on one machine do not meet each other.
    assert_ne!(world(&recorded("openmpi")).store.port, world(&recorded("sbatch-openmpi")).store.port);
    let mpich = |launcher| world(&recorded("mpich").started_by(launcher));
    assert_ne!(mpich(4145).store.port, mpich(4159).store.port);
    let port = mpich(4145).store.port;
    assert!((15_000..30_000).contains(&port) && mpich(4145).store.port == port);
    // A step of a job may be one of several.
    let step = |name: &str, step: &str| {
        let other = recorded(name).iter().map(|(k, v)| (k, if k == "SLURM_STEP_ID" { step } else { v })).collect();
        world(&other).store.port
    };
    for name in ["slurm", "sbatch-mpich"] {
        assert_ne!(step(name, "0"), step(name, "1"), "{name}");
    }
}

#[test]
fn a_run_that_its_launcher_names_has_keys_of_its_own() {
    for (name, run) in [
        ("torchrun", "beced67a-d9ae-4331-ae8a-56a625b39089"),
        ("openmpi", "656801793"),
        ("mpich", "process 4145"),
        ("slurm", "1.0"),
        ("sbatch-mpich", "3.0"),
    ] {
        assert_eq!(world(&recorded(name)).run, run, "{name}");
    }
    let generic = environment("RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1");
    assert_eq!(world(&generic).run, "", "nobody names it");
}

#[test]
fn ranks_without_a_local_size_are_on_one_machine_only_if_they_meet_on_it() {
    let generic = |more: &str| environment(&format!("RANK=1 WORLD_SIZE=2 MASTER_PORT=4000 {more}"));
    for host in ["localhost", "127.0.0.1", "127.0.1.1", "::1"] {
        let found = place(&generic(&format!("MASTER_ADDR={host}")));
        assert_eq!(found, (Launcher::Generic, [1, 2, 1, 2]), "{host}");
    }
    for host in ["head", "10.0.0.1"] {
        let error = detect(&generic(&format!("MASTER_ADDR={host}"))).unwrap_err().to_string();
        assert!(error.contains("LOCAL_WORLD_SIZE") && error.contains("MASTER_ADDR"), "{error}");
        let several = generic(&format!("MASTER_ADDR={host} LOCAL_WORLD_SIZE=1 LOCAL_RANK=0"));
        assert_eq!(place(&several), (Launcher::Generic, [1, 2, 0, 1]));
    }
}

#[test]
fn several_machines() {
    let slurm = "SLURM_PROCID=5 SLURM_STEP_ID=2 SLURM_STEP_NUM_TASKS=7 SLURM_LOCALID=1 SLURM_NODEID=2 SLURM_JOB_ID=81 \
                 SLURM_STEP_TASKS_PER_NODE=2(x3),1 SLURM_STEP_NODELIST=gpu[07-09,12] SLURM_RESTART_COUNT=3";
    let found = world(&environment(slurm));
    assert_eq!(place(&environment(slurm)), (Launcher::Slurm, [5, 7, 1, 2]));
    assert_eq!((found.store.host.as_str(), found.attempt), ("gpu07", 3));
    let other_rank =
        slurm.replace("PROCID=5", "PROCID=6").replace("NODEID=2", "NODEID=3").replace("LOCALID=1", "LOCALID=0");
    assert_eq!(world(&environment(&other_rank)).store, found.store, "all ranks meet at one place");
    let chosen = format!("{slurm} MASTER_ADDR=10.0.0.1 MASTER_PORT=1234");
    let chosen = world(&environment(&chosen)).store;
    assert_eq!((chosen.host.as_str(), chosen.port), ("10.0.0.1", 1234));

    let mpi = "OMPI_COMM_WORLD_RANK=9 OMPI_COMM_WORLD_SIZE=16 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=8 \
         PMIX_NAMESPACE=7";
    assert_eq!(detect(&environment(mpi)), Err(WorldError::NowhereToMeet { size: 16 }));
    let store = world(&environment(&format!("{mpi} MASTER_ADDR=head"))).store;
    assert_eq!(store.host, "head");
}

#[test]
fn torchrun_with_a_store_of_its_ranks_and_one_device_for_each() {
    let variables = "TORCHELASTIC_RUN_ID=x TORCHELASTIC_RESTART_COUNT=2 TORCHELASTIC_USE_AGENT_STORE=False RANK=3 WORLD_SIZE=4 \
                     LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_ADDR=head MASTER_PORT=29500";
    let found = world(&environment(variables));
    assert_eq!((found.local_rank, found.attempt, found.store.served_by), (0, 2, StoreHost::RankZero));
}

#[test]
fn our_own_launcher_inside_any_other_is_our_own() {
    let own = "DDPM_DIST_RUN_ID=a DDPM_DIST_ATTEMPT=1 RANK=2 WORLD_SIZE=3 LOCAL_RANK=2 LOCAL_WORLD_SIZE=3 MASTER_ADDR=127.0.0.1 \
               MASTER_PORT=4000";
    for name in ["torchrun", "openmpi", "mpich", "slurm", "sbatch-mpich"] {
        let path = format!("{}/tests/launchers/{name}.env", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(path).unwrap();
        let both = text.lines().chain(own.split_whitespace()).map(|v| v.split_once('=').unwrap()).collect();
        let found = world(&both);
        assert_eq!((found.launcher, found.rank, found.size, found.attempt), (Launcher::Own, 2, 3, 1), "inside {name}");
        assert_eq!((found.store.port, found.store.served_by), (4000, StoreHost::Launcher));
    }
}

#[test]
fn kubernetes_gives_a_machine_not_a_rank() {
    let node = |variables: &str| match detect(&environment(variables)) {
        Ok(Detected::Node(node)) => node,
        other => panic!("{other:?}"),
    };
    let kubeflow = "PET_NNODES=4 PET_NODE_RANK=2 PET_NPROC_PER_NODE=8 PET_MASTER_ADDR=run-0.run PET_MASTER_PORT=29500";
    let expected = Node { rank: 2, count: 4, ranks: Some(8), meet: Some(("run-0.run".into(), 29500)) };
    assert_eq!(node(kubeflow), expected);
    let job = "JOB_COMPLETION_INDEX=1 PET_NNODES=2 PET_MASTER_ADDR=a PET_MASTER_PORT=1 PET_NPROC_PER_NODE=auto";
    assert_eq!(node(job), Node { rank: 1, count: 2, ranks: None, meet: Some(("a".into(), 1)) });
    assert_eq!(node("PET_NNODES=1 PET_NODE_RANK=0").meet, None, "one machine meets nobody");
}

#[test]
fn what_is_left_out_or_contradicts_itself_is_named() {
    let refused = |variables: &str, words: &[&str]| {
        let error = detect(&environment(variables)).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{variables}: {error}");
    };
    let generic = "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=localhost";
    refused(generic, &["MASTER_PORT"]);
    refused(&format!("{generic} MASTER_PORT=70000"), &["MASTER_PORT", "70000"]);
    refused("RANK=2 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1", &["rank is 2", "less than 2"]);
    refused("RANK=-1 WORLD_SIZE=2", &["RANK", "-1"]);
    refused("RANK=one WORLD_SIZE=2", &["RANK", "one"]);
    refused("TORCHELASTIC_RUN_ID=x RANK=0 WORLD_SIZE=2", &["torchrun", "LOCAL_RANK"]);
    refused("RANK=0 WORLD_SIZE=2 LOCAL_RANK=3 LOCAL_WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=1", &["local rank is 3"]);
    refused("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=4 MASTER_ADDR=h MASTER_PORT=1", &["local ranks is 4"]);
    refused("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=1 MASTER_ADDR=h MASTER_PORT=1", &["LOCAL_RANK is not set"]);
    refused("PMI_RANK=0 PMI_SIZE=2 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=2", &["one run from another", "MASTER_PORT"]);
    // Numbers that nobody means.
    for size in ["0", "4097", "18446744073709551615"] {
        refused(
            &format!("RANK=0 WORLD_SIZE={size} MASTER_ADDR=localhost MASTER_PORT=1"),
            &["number of ranks", size, "1 to 4096"],
        );
        let pod = "JOB_COMPLETION_INDEX=0 PET_MASTER_ADDR=a PET_MASTER_PORT=1";
        refused(&format!("{pod} PET_NNODES=2 PET_NPROC_PER_NODE={size}"), &["PET_NPROC_PER_NODE", size, "1 to 4096"]);
        refused(&format!("{pod} PET_NNODES={size}"), &["PET_NNODES", size]);
    }
    let slurm = "SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=0 SLURM_STEP_NODELIST=n";
    refused(slurm, &["SLURM_STEP_TASKS_PER_NODE"]);
    refused(&format!("{slurm} SLURM_STEP_TASKS_PER_NODE=2 SLURM_NODEID=4"), &["SLURM_STEP_TASKS_PER_NODE", "`2`"]);
    refused("JOB_COMPLETION_INDEX=3 PET_NNODES=3", &["node's rank is 3"]);
    refused("JOB_COMPLETION_INDEX=0", &["PET_NNODES"]);
    refused("JOB_COMPLETION_INDEX=0 PET_NNODES=2", &["PET_MASTER_ADDR"]);
    // A single process needs nobody.
    assert_eq!(place(&environment("RANK=0 WORLD_SIZE=1")), (Launcher::Generic, [0, 1, 0, 1]));
    // Empty is unset.
    let empty = [("RANK", ""), ("WORLD_SIZE", "2")].into_iter().collect();
    assert_eq!(detect(&empty), Ok(Detected::Alone));
}
