"""ROS recordings: MCAP, ROS 2 bags and ROS 1 bags."""
