//! Sums of which each GPU gets its slice, and slices given to all: together they leave the bits of a sum that all get.

use crate::machine::not_tested;
use crate::nccl::{FINE, Place, WITH_KERNELS, World, tell, value};
use ddpm_dist::collective::nccl::Nccl;
use ddpm_dist::collective::{Adding, Collective, CollectiveError, Exchange};
use ddpm_dist::device::cuda::{Cuda, Image};
use ddpm_dist::device::{BufferId, Device, DeviceError};
use std::ops::Range;

/// Multiples of 8 floats for each of 2 or 3 ranks, which stand at multiples of 16 bytes in bf16 too; slices are no rounder than that.
const CUTS: [usize; 4] = [0, 49_968, 60_000, 100_128];
const FLOATS: usize = CUTS[3];

fn buckets() -> impl Iterator<Item = Range<usize>> {
    CUTS.windows(2).map(|cuts| cuts[0]..cuts[1])
}

/// All of each sum at once.
fn reduce(nccl: &mut Nccl, device: &mut Device, buffer: BufferId) -> Result<(), CollectiveError> {
    buckets().try_for_each(|bucket| nccl.start(Exchange::AllReduce, device, buffer, bucket))?;
    buckets().try_for_each(|bucket| nccl.wait(Exchange::AllReduce, device, buffer, bucket))
}

/// The same by slices. Between the two, nothing is left of the slices of others.
fn reduce_by_slices(nccl: &mut Nccl, device: &mut Device, buffer: BufferId) -> Result<(), CollectiveError> {
    let (rank, size) = (nccl.rank(), nccl.world_size());
    buckets().try_for_each(|bucket| nccl.start(Exchange::ReduceScatter, device, buffer, bucket))?;
    buckets().try_for_each(|bucket| nccl.wait(Exchange::ReduceScatter, device, buffer, bucket))?;
    let Device::Cuda(cuda) = &*device else { unreachable!("it is a GPU") };
    for bucket in buckets() {
        let slice =
            |rank: usize| bucket.start + rank * bucket.len() / size..bucket.start + (rank + 1) * bucket.len() / size;
        for other in (0..size).filter(|other| *other != rank) {
            cuda.gpu().clear(cuda.bytes(buffer, &Exchange::AllReduce.in_bytes(&slice(other)))).unwrap();
        }
    }
    let bytes = |bucket: Range<usize>| 4 * bucket.start..4 * bucket.end;
    buckets().try_for_each(|bucket| nccl.start(Exchange::AllGather, device, buffer, bytes(bucket)))?;
    buckets().try_for_each(|bucket| nccl.wait(Exchange::AllGather, device, buffer, bytes(bucket)))
}

/// What `work` makes of `mine`.
fn sums(
    (nccl, device, buffer): (&mut Nccl, &mut Device, BufferId),
    mine: &[f32],
    work: impl FnOnce(&mut Nccl, &mut Device) -> Result<(), CollectiveError>,
) -> Result<Vec<f32>, CollectiveError> {
    device.upload(buffer, 0, mine)?;
    work(nccl, device)?;
    nccl.note_sums()?;
    nccl.settle()?;
    let mut sums = vec![0.0; FLOATS];
    device.download(buffer, 0, &mut sums)?;
    Ok(sums)
}

/// The rank that the tests below start.
#[test]
#[ignore = "is started by the tests below"]
fn a_rank() {
    let Some((place, mut nccl)) = Place::meet() else { return };
    let open = if place.adding == Adding::Fast { Cuda::without_kernels } else { Cuda::open };
    let mut device = Device::Cuda(Box::new(open(0).unwrap()));
    let buffer = device.allocate(4 * FLOATS).unwrap();
    nccl.join_gpus(&mut device).unwrap();
    let longest = buckets().map(|bucket| bucket.len()).max().unwrap();
    nccl.reserve(&mut device, longest).unwrap();
    let mut graph = None;
    place.work(&mut nccl, |nccl, step| {
        let mine: Vec<f32> = (0..FLOATS).map(|i| value(nccl.rank(), step, i, place.adding)).collect();
        let said = |error: CollectiveError| error.to_string();
        let expected =
            sums((nccl, &mut device, buffer), &mine, |nccl, device| reduce(nccl, device, buffer)).map_err(said)?;
        if step == 1 {
            let Device::Cuda(cuda) = &device else { unreachable!("it is a GPU") };
            let capture = cuda.capture().unwrap();
            reduce_by_slices(nccl, &mut device, buffer).map_err(said)?;
            graph = Some(capture.end().unwrap());
        }
        let found = sums((nccl, &mut device, buffer), &mine, |nccl, device| match (&graph, &*device) {
            (Some(graph), Device::Cuda(cuda)) => cuda.replay(graph).map_err(|error| DeviceError::from(error).into()),
            _ => reduce_by_slices(nccl, device, buffer),
        })
        .map_err(said)?;
        let wrong = (0..FLOATS).find(|&i| found[i].to_bits() != expected[i].to_bits());
        assert_eq!(wrong, None, "step {step}");
        Ok(())
    });
    // Graphs go before their communicator.
    drop(graph);
    if let Some(launches) = crate::graph::launches() {
        tell(&format!("launches: {launches}."));
    }
}

fn world(size: usize, adding: &'static str) -> World {
    World { rank: "nccl_slices::a_rank", size, adding, libraries: &WITH_KERNELS, ..FINE }
}

#[test]
fn slices_of_sums_that_are_given_to_all_have_the_bits_of_all_of_the_sum() {
    if Image::embedded().is_none() {
        return not_tested("sums along a tree and in bf16 need kernels: built without nvcc");
    }
    for (size, adding) in [(2, "fast"), (3, "fast"), (2, "bf16"), (2, "tree"), (3, "tree"), (4, "tree"), (8, "tree")] {
        for (rank, said) in world(size, adding).run().iter().enumerate() {
            // Of three steps the first is begun one by one.
            said.assert(rank, &["ended: well", "launches: 2.", "has left its communicator"]);
        }
    }
}

#[test]
fn a_rank_that_cannot_begin_is_named_to_the_others() {
    if Image::embedded().is_none() {
        return not_tested("sums between GPUs with kernels: built without nvcc");
    }
    for (fault, words) in
        [("ncclReduceScatter", "cannot sum up 49968 floats"), ("ncclAllGather", "cannot gather 199872 bytes")]
    {
        let settings = vec![(1, "CUDA_SIM_NCCL_FAIL", fault)];
        for (rank, said) in (World { settings, ..world(3, "fast") }).run().iter().enumerate() {
            match rank {
                1 => said.assert(rank, &["ended: NCCL 2.29.2", words, "(3)"]),
                _ => said.assert(rank, &["ended: rank 1 was lost", "has aborted its communicator"]),
            }
        }
    }
}
