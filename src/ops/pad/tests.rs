use super::pad;
use crate::ops::testing::{Case, Input, random};

#[test]
fn channels_and_rows_are_filled_up_and_their_gradients_left_out() {
    for (shape, [first, last]) in [([2, 3, 3, 3], [2, 8]), ([3, 3, 3, 4], [8, 4]), ([2, 1, 1, 5], [2, 5])] {
        let len = shape.iter().product();
        let x = random(1, len);
        let [_, h, w, c] = shape;
        let dy = random(2, first * h * w * last);
        let case = Case::new(vec![Input::f32("x", shape, &x)]);
        // Twice: the second gradient is added to the first.
        let outcome = case.run(&dy, |tape, inputs| {
            let [a, b] = [(); 2].map(|()| pad(tape, inputs[0], [first, last]));
            crate::ops::add::add(tape, a, b)
        });
        let gradient = outcome.gradient("x");
        for row in 0..first * h * w {
            for channel in 0..last {
                let is_there = row < shape[0] * h * w && channel < c;
                let place = row * c + channel;
                let expected = if is_there { 2.0 * x[place] } else { 0.0 };
                assert_eq!(outcome.y[row * last + channel], expected, "{shape:?}, row {row}, channel {channel}");
                if is_there {
                    assert_eq!(gradient[place], dy[row * last + channel] * 2.0, "{shape:?}, gradient {place}");
                }
            }
        }
    }
}
