use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::device::cpu::pool::{BASE_SCRATCH, Pool};

fn message(panic: Box<dyn std::any::Any + Send>) -> String {
    match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast::<&str>().map(|text| text.to_string()).unwrap_or_default(),
    }
}

#[test]
fn every_task_runs_once_at_any_thread_count() {
    for threads in 1..=4 {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads);
        for tasks in [0, 1, 2, 3, 17, 1000] {
            let seen: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(tasks, &|i, _| {
                seen[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
        }
    }
}

#[test]
fn many_small_runs_with_and_without_sleep_in_between() {
    let pool = Pool::new(3);
    let total = AtomicUsize::new(0);
    for round in 0..20_000usize {
        pool.run(3, &|i, _| {
            total.fetch_add(i, Ordering::Relaxed);
        });
        if round % 2_000 == 0 {
            std::thread::sleep(Duration::from_millis(1)); // long enough for the workers to fall asleep
        }
    }
    assert_eq!(total.load(Ordering::Relaxed), 20_000 * 3);
}

#[test]
fn a_caller_waits_for_slow_workers() {
    let pool = Pool::new(2);
    let done = AtomicUsize::new(0);
    pool.run(2, &|_, _| {
        std::thread::sleep(Duration::from_millis(5));
        done.fetch_add(1, Ordering::SeqCst);
    });
    assert_eq!(done.load(Ordering::SeqCst), 2);
}

#[test]
fn scratch_is_aligned_private_and_grows() {
    let mut pool = Pool::new(3);
    let check = |pool: &Pool, len: usize| {
        pool.run(64, &|i, scratch| {
            assert_eq!(scratch.as_ptr() as usize % 64, 0);
            assert!(scratch.len() >= len);
            // Were it shared, another task's number would be found.
            let end = scratch.len() - 1;
            (scratch[0], scratch[end]) = (i as f32, i as f32);
            std::thread::yield_now();
            assert_eq!((scratch[0], scratch[end]), (i as f32, i as f32));
        });
    };
    check(&pool, BASE_SCRATCH);
    pool.reserve_scratch(10);
    check(&pool, BASE_SCRATCH);
    pool.reserve_scratch(BASE_SCRATCH + 12345);
    check(&pool, BASE_SCRATCH + 12345);
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    for threads in 1..=3 {
        let pool = Pool::new(threads);
        for guilty in 0..8 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(8, &|i, _| {
                    assert!(i != guilty, "task {i}");
                });
            }));
            assert_eq!(message(caught.unwrap_err()), format!("task {guilty}"));
            let ran = AtomicUsize::new(0);
            pool.run(8, &|_, _| {
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.load(Ordering::Relaxed), 8);
        }
        // All at once: one of them is reported.
        let caught = catch_unwind(AssertUnwindSafe(|| pool.run(8, &|_, _| panic!("all"))));
        assert_eq!(message(caught.unwrap_err()), "all");
    }
}

#[test]
fn a_run_inside_a_task_is_refused_not_a_deadlock() {
    for threads in 1..=3 {
        let pool = Pool::new(threads);
        let caught = catch_unwind(AssertUnwindSafe(|| pool.run(2, &|_, _| pool.run(2, &|_, _| ()))));
        assert!(message(caught.unwrap_err()).contains("inside a task"));
        pool.run(2, &|_, _| ());
    }
}

#[test]
fn callers_on_several_threads_take_turns() {
    let pool = Pool::new(2);
    let total = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..500 {
                    pool.run(4, &|_, _| {
                        total.fetch_add(1, Ordering::Relaxed);
                    });
                }
            });
        }
    });
    assert_eq!(total.load(Ordering::Relaxed), 3 * 500 * 4);
}

#[test]
fn chunks_are_disjoint_and_cover_all() {
    let pool = Pool::new(3);
    let mut a = vec![0u32; 1003];
    pool.for_chunks(&mut a, 10, |i, chunk, _| {
        assert_eq!(chunk.len(), if i == 100 { 3 } else { 10 });
        chunk.iter_mut().for_each(|x| *x += i as u32 + 1);
    });
    assert!(a.iter().enumerate().all(|(i, &x)| x == (i / 10) as u32 + 1));

    let (mut b, mut c) = (vec![0u8; 101], vec![0.0f64; 404]);
    pool.for_chunks3((&mut a, 10), (&mut b, 1), (&mut c, 4), |i, a, b, c, _| {
        a.fill(7);
        b[0] = i as u8;
        c.fill(i as f64);
    });
    assert!(a.iter().all(|&x| x == 7));
    assert!(b.iter().enumerate().all(|(i, &x)| x == i as u8));
    assert!(c.iter().enumerate().all(|(i, &x)| x == (i / 4) as f64));

    let mut none: Vec<f32> = Vec::new();
    pool.for_chunks2((&mut a, 10), (&mut none, 5), |i, a, none, _| {
        assert!(none.is_empty());
        a.fill(i as u32);
    });
    assert!(a.iter().enumerate().all(|(i, &x)| x == (i / 10) as u32));

    let caught = catch_unwind(AssertUnwindSafe(|| pool.for_chunks2((&mut a, 10), (&mut b, 2), |_, _, _, _| ())));
    assert!(message(caught.unwrap_err()).contains("different numbers of chunks"));
}
