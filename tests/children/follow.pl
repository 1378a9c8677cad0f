# A child in Perl that tells how far it is: one job at a time.
use strict;
use warnings;
use JSON::PP;
use Time::HiRes qw(sleep);

$| = 1;
my $json = JSON::PP->new->utf8->canonical;
sub say_ { print STDOUT $json->encode({@_}), "\n" }

say_(status => "ready", protocol => 1, tasks => ["perl.follow"], features => ["progress"]);
while (my $line = <STDIN>) {
    my $request = $json->decode($line);
    my ($count, $directory) = @{ $request->{payload}{args} };
    for my $number (1 .. $count) {
        my $meta = { done => $number, of => $count };
        say_(id => $request->{id}, status => "progress", meta => $meta);
        sleep 0.01 until -e "$directory/$number";
    }
    say_(id => $request->{id}, status => "ok", result => $count);
}
